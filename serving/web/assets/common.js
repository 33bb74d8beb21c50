// What the pages share: elements made of text alone, posts, messages, and what this browser remembers.

/** Make an element. Children that are strings become text, never HTML. */
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
  #storage; // a function: where a browser keeps nothing, the mere mention of its storage raises
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

/** This browser's memory and this tab's, or the page's where the browser keeps none. */
export const memory = new Memory(() => localStorage);
export const tab = new Memory(() => sessionStorage);

/** An id that nobody else makes. (`crypto.randomUUID` is absent where a page comes over plain HTTP.) */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Who judges: a random id of this browser, which names nobody. */
export function annotator() {
  let id = memory.get("annotator");
  if (!id) memory.set("annotator", (id = newId()));
  return id;
}

let clearing;
/** Show a message at the head of the page; screen readers read it out. A quiet one is for them alone. */
export function say(text, bad = false, quiet = false) {
  const line = make("p", { className: quiet ? "quietly" : bad ? "bad" : "" }, text);
  find("status").replaceChildren(line);
  clearTimeout(clearing);
  clearing = setTimeout(() => line.remove(), bad ? 12000 : 5000);
}

/** The server understood and said no; sending the same again would not help. It may name the prompt that it is about. */
export class Refused extends Error {
  constructor(message, status, prompt) {
    super(message);
    this.status = status;
    this.prompt = prompt;
  }
}

/** The server was not reached, or cannot at the moment; sending the same again may help. */
export class Unreached extends Error {}

/** Post JSON and return the response where it is good. */
export async function request(route, body, signal) {
  let response;
  try {
    response = await fetch(`feedback/${route}`, {
      method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreached("The server cannot be reached.");
  }
  if (response.ok) return response;
  let said = null;
  try {
    said = await response.json();
  } catch { /* not JSON: not the endpoint's */ }
  // Whoever else answers here (a proxy, another program on this port) has not understood and cannot refuse.
  if (typeof said?.error !== "string") throw new Unreached(`The server answered ${response.status}.`);
  if (response.status >= 500 || response.status === 429) throw new Unreached(said.error);
  throw new Refused(said.error, response.status, said.prompt);
}

/** Post JSON and return the reply, its bytes all here. */
export async function post(route, body, signal) {
  const response = await request(route, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreached("The connection broke off.");
  }
}

/** Show a slider's value beside it and remember both it and every other setting of a form. */
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
