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

/** This browser's memory, or this page's where the browser keeps none. */
const fallback = new Map();
export const memory = {
  get(key, otherwise = null) {
    try {
      const text = localStorage.getItem(`bessemer.${key}`);
      return text === null ? fallback.get(key) ?? otherwise : JSON.parse(text);
    } catch {
      return fallback.get(key) ?? otherwise;
    }
  },
  set(key, value) {
    try {
      localStorage.setItem(`bessemer.${key}`, JSON.stringify(value));
    } catch {
      fallback.set(key, value);
    }
  },
};

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

/** The server understood and said no; sending the same again would not help. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
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
  let sentence;
  try {
    sentence = (await response.json()).error;
  } catch { /* not ours: a proxy's, or the server on its way down */ }
  sentence ||= `The server answered ${response.status}.`;
  if (response.status >= 500 || response.status === 429) throw new Unreached(sentence);
  throw new Refused(sentence, response.status);
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
