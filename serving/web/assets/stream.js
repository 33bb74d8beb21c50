// Read one streamed answer: server-sent events of a POST, which EventSource does not support.

import { request, UnreachableError } from "./common.js";

/** Request an answer, call `piece` with each piece of text, return the last event {id, model, finish_reason, problem}. */
export async function stream(body, piece, signal) {
  const response = await request("answers", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (pending + value).split("\n");
      pending = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const event = JSON.parse(line.slice(6));
        if ("text" in event) piece(event.text);
        else return event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  throw new UnreachableError("The connection was lost; this answer is incomplete.");
}
