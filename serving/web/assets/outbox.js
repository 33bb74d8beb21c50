// Judgements on their way to the server. Each is kept in this browser under an id until the server says that it is on
// disk, and is sent again under the same id where no answer came: the server keeps it once.

import { find, make, memory, post, Refused, say } from "./common.js";

const KEY = "outbox";
const FIRST_WAIT = 1000;
const LONGEST_WAIT = 30000;

let wait = FIRST_WAIT;
let timer;
let running;
const waiting = new Map(); // key of a post of this page -> the post, and what to do with the reply

/** Send a judgement. Returns the server's reply, or null where it is kept here for later; throws Refused. */
export async function send(route, body, { late, tolerate } = {}) {
  const item = { key: `${route} ${body.id}`, route, body, tolerate };
  memory.set(KEY, [...memory.get(KEY, []), item]);
  const outcome = new Promise((resolve, reject) => waiting.set(item.key, { item, resolve, reject, late }));
  flush();
  return outcome;
}

/** Forget a judgement that was not sent yet. */
export function forget(route, id) {
  waiting.delete(`${route} ${id}`);
  drop(`${route} ${id}`);
}

/** What is to be sent: what this browser keeps, and what this page asked for (another tab may have sent it already). */
function pending() {
  const kept = memory.get(KEY, []);
  const keys = new Set(kept.map((item) => item.key));
  return [...kept, ...[...waiting.values()].map((asked) => asked.item).filter((item) => !keys.has(item.key))];
}

function drop(key) {
  memory.set(KEY, memory.get(KEY, []).filter((item) => item.key !== key));
  show();
}

/** Send all that waits, one after the other. */
export function flush() {
  clearTimeout(timer);
  running ??= work().finally(() => { running = undefined; });
  return running;
}

async function work() {
  for (let items = pending(); items.length; items = pending()) {
    const item = items[0];
    const asked = waiting.get(item.key);
    try {
      const reply = await post(item.route, item.body);
      waiting.delete(item.key);
      drop(item.key);
      if (asked?.queued) asked.late?.(reply);
      else asked?.resolve(reply);
      wait = FIRST_WAIT;
    } catch (error) {
      if (error instanceof Refused) {
        waiting.delete(item.key);
        drop(item.key);
        if (item.tolerate === error.status) asked?.resolve({});
        else if (asked && !asked.queued) asked.reject(error);
        else say(`One judgement was refused and is not saved: ${error.message}`, true);
        continue;
      }
      show(error.message);
      for (const other of waiting.values()) {
        other.queued = true;
        other.resolve(null);
      }
      timer = setTimeout(flush, wait);
      wait = Math.min(2 * wait, LONGEST_WAIT);
      return;
    }
  }
}

/** Tell on the page what is not saved yet, and why. */
function show(reason) {
  const place = find("unsent");
  const count = pending().length;
  place.hidden = count === 0 || (!reason && place.hidden);
  if (place.hidden) return;
  const what = count === 1 ? "One judgement is" : `${count} judgements are`;
  if (reason) place.dataset.reason = reason;
  place.replaceChildren(
    make("p", {}, `${what} not saved yet. ${place.dataset.reason} Kept in this browser and sent again by itself.`),
    make("button", { type: "button", onclick: flush }, "Try now"),
  );
}

addEventListener("online", flush);
flush(); // what an earlier visit could not send
