// The queue of unsent judgements. Each is kept in this browser until the server confirms it, and is retried under the
// same id, so that the server stores it once.

import { find, make, memory, post, RejectedError, say } from "./common.js";

const KEY = "outbox";
const FIRST_WAIT_MS = 1000;
const MAX_WAIT_MS = 30000;

let wait = FIRST_WAIT_MS;
let timer;
let running;
const waiting = new Map(); // key of a post of this page -> the post and its callbacks

/** Send a judgement. Returns the server's reply, or null if it is queued for later; throws RejectedError. */
export async function send(route, body, { late, tolerate } = {}) {
  const item = { key: `${route} ${body.id}`, route, body, tolerate };
  memory.set(KEY, [...memory.get(KEY, []), item]);
  const outcome = new Promise((resolve, reject) => waiting.set(item.key, { item, resolve, reject, late }));
  flush();
  return outcome;
}

/** Drop a judgement that was not sent yet. */
export function forget(route, id) {
  waiting.delete(`${route} ${id}`);
  drop(`${route} ${id}`);
}

/** Return the posts to send: those stored in this browser and those of this page (another tab may have sent one). */
function pending() {
  const kept = memory.get(KEY, []);
  const keys = new Set(kept.map((item) => item.key));
  return [...kept, ...[...waiting.values()].map((asked) => asked.item).filter((item) => !keys.has(item.key))];
}

function drop(key) {
  memory.set(KEY, memory.get(KEY, []).filter((item) => item.key !== key));
  show();
}

/** Send all queued posts, one after the other. */
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
      wait = FIRST_WAIT_MS;
    } catch (error) {
      if (error instanceof RejectedError) {
        waiting.delete(item.key);
        drop(item.key);
        if (item.tolerate === error.status) asked?.resolve({});
        else if (asked && !asked.queued) asked.reject(error);
        else say(`One judgement was rejected and is not saved: ${error.message}`, true);
        continue;
      }
      show(error.message);
      for (const other of waiting.values()) {
        other.queued = true;
        other.resolve(null);
      }
      timer = setTimeout(flush, wait);
      wait = Math.min(2 * wait, MAX_WAIT_MS);
      return;
    }
  }
}

/** Show how many judgements are not saved yet, and why. */
function show(reason) {
  const box = find("unsent");
  const count = pending().length;
  box.hidden = count === 0 || (!reason && box.hidden);
  if (box.hidden) return;
  const what = count === 1 ? "One judgement is" : `${count} judgements are`;
  if (reason) box.dataset.reason = reason;
  box.replaceChildren(
    make("p", {}, `${what} not saved yet. ${box.dataset.reason} Kept in this browser and retried automatically.`),
    make("button", { type: "button", onclick: flush }, "Try now"),
  );
}

addEventListener("online", flush);
flush(); // posts left from an earlier visit
