// The chat page: ask one model or two side by side, watch the answers come, say what you think of them.

import { annotator, find, make, newId, Refused, remember, say } from "./common.js";
import { flagButton, thumbs } from "./opinions.js";
import { send } from "./outbox.js";
import { stream } from "./stream.js";

const SPREAD = 0.8; // the temperature of two answers of one model, where none is set: at 0 both would be the same
let history = []; // turns that the next question follows, where the conversation is kept
let running = null; // the AbortController of the answers that are coming

const box = find("message");

function models() {
  const first = find("first")?.value ?? null;
  if (!find("side-by-side").checked) return [first];
  const pair = [first, find("second")?.value ?? null];
  return Math.random() < 0.5 ? pair : pair.reverse(); // whose answer stands where is told after the verdict
}

function busy(controller) {
  running = controller;
  find("stop").hidden = !controller;
  find("send").hidden = Boolean(controller);
}

function reply(label) {
  const text = make("p", { className: "text" });
  const tools = make("div", { className: "tools" });
  const name = make("p", { className: "who" }, label);
  const element = make("article", { className: "reply busy", ariaLabel: label, ariaBusy: "true" }, name, text, tools);
  return { element, text, tools, name, label };
}

/** Fill one reply; return {id, text, model} where it came whole and was kept, else null. */
async function fill(shown, body, signal) {
  let outcome = null;
  try {
    const end = await stream(body, (piece) => {
      const low = innerHeight + scrollY > document.documentElement.scrollHeight - 80;
      shown.text.append(piece);
      if (low) scrollTo(0, document.documentElement.scrollHeight);
    }, signal);
    outcome = { ...end, text: shown.text.textContent };
    if (end.finish_reason === "length") shown.name.textContent += " · cut at the longest length";
    if (!end.id) shown.tools.append(make("span", { className: "fine" }, end.problem ? `It cannot be rated: ${end.problem}` : "No answer came."));
  } catch (error) {
    const stopped = error.name === "AbortError";
    const line = stopped ? "Stopped; an answer that is not whole is not rated." : error.message;
    shown.tools.append(make("span", { className: stopped ? "fine" : "problem" }, line));
  }
  shown.element.classList.remove("busy");
  shown.element.ariaBusy = "false";
  return outcome?.id ? outcome : null;
}

function rateable(shown, outcome) {
  shown.tools.append(...thumbs(outcome.id, shown.label), flagButton(outcome, shown.label));
}

function reveal(shown, outcome) {
  const address = `provenance?answer=${encodeURIComponent(outcome.id)}`;
  shown.tools.append(make("a", { href: address, target: "_blank", rel: "noopener", ariaLabel: `What made ${shown.label}` }, "What made this?"));
  shown.name.textContent += ` · ${shown.label === outcome.name ? "" : `${outcome.name} · `}${outcome.model}`;
}

/** Ask which of two answers is better; a conversation that is kept goes on from that one, told in `said`. */
function verdict(shown, outcomes, said) {
  const words = [["A is better", [1, 2]], ["Both alike", [1, 1]], ["B is better", [2, 1]]];
  const row = make("div", { className: "verdict", role: "group", ariaLabel: "Which answer is better?" });
  const id = newId();
  const press = async (ranks) => {
    for (const button of row.querySelectorAll("button")) button.disabled = true;
    try {
      const body = { id, answers: outcomes.map((outcome) => outcome.id), ranks, annotator: annotator() };
      const kept = await send("rankings", body, { late: (saved) => say(`Ranking ${saved.saved.number} is saved now.`) });
      const thanks = kept ? `Saved as ranking ${kept.saved.number}.` : "Not saved yet; it is sent again by itself.";
      row.replaceChildren(make("span", { className: "fine" }, thanks));
      shown.forEach((one, at) => {
        one.element.classList.toggle("chosen", ranks[at] === 1 && ranks[1 - at] === 2);
        reveal(one, outcomes[at]);
      });
      said.content = outcomes[ranks[0] <= ranks[1] ? 0 : 1].text;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      row.replaceChildren(make("span", { className: "problem" }, error.message));
    }
  };
  row.append(make("span", {}, "Which is better?"), ...words.map(([word, ranks]) =>
    make("button", { type: "button", onclick: () => press(ranks) }, word)));
  return row;
}

async function ask(question) {
  const names = models();
  const set = Number(find("temperature").value);
  const temperature = names.length > 1 && names[0] === names[1] && set === 0 ? SPREAD : set;
  const messages = [...(find("remembers").checked ? history : []), { role: "user", content: question }];
  const shown = names.map((name, at) => reply(names.length > 1 ? `Answer ${"AB"[at]}` : name ?? "Answer"));
  const replies = make("div", { className: "replies" }, ...shown.map((one) => one.element));
  find("empty")?.remove();
  const turn = make("div", {}, replies);
  find("talk").append(make("div", { className: "asked" }, make("p", {}, question)), turn);
  scrollTo(0, document.documentElement.scrollHeight);
  const controller = new AbortController();
  busy(controller);
  const seeds = crypto.getRandomValues(new Uint32Array(names.length));
  const outcomes = await Promise.all(names.map((model, at) =>
    fill(shown[at], { messages, model, temperature, seed: temperature ? seeds[at] : null }, controller.signal)));
  busy(null);
  outcomes.forEach((outcome, at) => { if (outcome) rateable(shown[at], outcome); });
  const whole = outcomes.every(Boolean);
  const [first] = outcomes;
  const said = { role: "assistant", content: first?.text }; // of this turn, whatever is asked before its verdict
  if (first) history = [...messages, said];
  const plain = (text) => text.split(/\s+/).join(" ").trim();
  if (whole && outcomes.length > 1 && plain(first.text) !== plain(outcomes[1].text)) {
    turn.append(verdict(shown, outcomes, said));
  } else {
    if (whole && outcomes.length > 1) turn.append(make("p", { className: "fine" }, "Both say the same."));
    outcomes.forEach((outcome, at) => { if (outcome) reveal(shown[at], outcome); });
  }
  const read = shown.map((one) => `${one.label}: ${one.text.textContent}`).join(". ");
  say(whole ? read : `The answer ended early. ${read}`, false, true);
  scrollTo(0, document.documentElement.scrollHeight);
  box.focus();
}

function grow() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function submit() {
  const question = box.value.trim();
  if (running || !question) return;
  box.value = "";
  grow();
  ask(question);
}

function compare() {
  const label = find("second-label");
  if (label) label.hidden = !find("side-by-side").checked;
}

remember(find("compose"), "chat");
find("compose").addEventListener("submit", submit);
find("compose").addEventListener("change", compare);
find("stop").addEventListener("click", () => running?.abort());
box.addEventListener("input", grow);
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
compare();
find("options").open = innerWidth >= 700;
box.focus();
