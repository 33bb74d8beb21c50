// Shared by the pages: safe element creation, POST requests, status messages, and browser storage.

/** Create an element. String children become text nodes, never HTML. */
export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

export const find = (id) => document.getElementById(id);

class Memory {
  #storage; // a function: with storage disabled, accessing `localStorage` throws
  #fallback = new Map();

  constructor(storage) {
    this.#storage = storage;
  }

  get(key, otherwise = null) {
    try {
      const text = this.#storage().getItem(`bessemer.${key}`);
      return text === null ? this.#fallback.get(key) ?? otherwise : JSON.parse(text);
    } catch {
      return this.#fallback.get(key) ?? otherwise;
    }
  }

  set(key, value) {
    try {
      this.#storage().setItem(`bessemer.${key}`, JSON.stringify(value));
    } catch {
      this.#fallback.set(key, value);
    }
  }
}

/** Storage of this browser and of this tab; in memory if the browser's storage is disabled. */
export const memory = new Memory(() => localStorage);
export const tab = new Memory(() => sessionStorage);

/** Return a random 128-bit id. (`crypto.randomUUID` is not available over plain HTTP.) */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The annotator's id: random, stored in this browser, without personal data. */
export function annotator() {
  let id = memory.get("annotator");
  if (!id) memory.set("annotator", (id = newId()));
  return id;
}

let clearing;
/** Show a status message; screen readers announce it. A `quiet` one is for screen readers only. */
export function say(text, bad = false, quiet = false) {
  const line = make("p", { className: quiet ? "quietly" : bad ? "bad" : "" }, text);
  find("status").replaceChildren(line);
  clearTimeout(clearing);
  clearing = setTimeout(() => line.remove(), bad ? 12000 : 5000);
}

/** The endpoint rejected the request; a retry would not help. `prompt` is the question concerned, if any. */
export class RejectedError extends Error {
  constructor(message, status, prompt) {
    super(message);
    this.status = status;
    this.prompt = prompt;
  }
}

/** The server could not be reached or is not available; a retry may help. */
export class UnreachableError extends Error {}

/** Post JSON and return the response if it is ok; throw RejectedError or UnreachableError otherwise. */
export async function request(route, body, signal) {
  let response;
  try {
    response = await fetch(`feedback/${route}`, {
      method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new UnreachableError("The server cannot be reached.");
  }
  if (response.ok) return response;
  let reply = null;
  try {
    reply = await response.json();
  } catch { /* not JSON, so not from the endpoint */ }
  // Errors of a proxy or of another program on this port are not rejections by the endpoint.
  if (typeof reply?.error !== "string") throw new UnreachableError(`The server answered ${response.status}.`);
  if (response.status >= 500 || response.status === 429) throw new UnreachableError(reply.error);
  throw new RejectedError(reply.error, response.status, reply.prompt);
}

/** Post JSON and return the parsed reply. */
export async function post(route, body, signal) {
  const response = await request(route, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new UnreachableError("The connection was lost.");
  }
}

/** Restore a form's settings from storage, save them on change, and show slider values. */
export function remember(form, key) {
  const kept = memory.get(key, {});
  for (const field of form.elements) {
    if (!field.name) continue;
    if (field.type === "checkbox") {
      if (`${field.name}:${field.value}` in kept) field.checked = kept[`${field.name}:${field.value}`];
    } else if (field.name in kept && (field.tagName !== "SELECT" || [...field.options].some((o) => o.value === kept[field.name]))) {
      field.value = kept[field.name];
    }
  }
  const changed = () => {
    const values = {};
    for (const field of form.elements) {
      if (!field.name) continue;
      if (field.type === "checkbox") values[`${field.name}:${field.value}`] = field.checked;
      else values[field.name] = field.value;
      if (field.type === "range") find(`${field.id}-value`).textContent = Number(field.value).toFixed(1);
    }
    memory.set(key, values);
  };
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  changed();
}
