// The chat page: ask one model or several side by side, watch the answers come, say what you think of them.

import { annotator, find, make, newId, Refused, remember, say } from "./common.js";
import { flagButton, thumbs } from "./opinions.js";
import { send } from "./outbox.js";
import { stream } from "./stream.js";

const SPREAD = 0.8; // the temperature of two answers of one model, where none is set: at 0 both would be the same
const LETTERS = "ABCDEF";
let history = []; // turns that the next question follows, where the conversation is kept
let running = null; // the AbortController of the answers that are coming

const box = find("message");

function models() {
  const first = find("first")?.value ?? null;
  if (!find("side-by-side").checked) return [first];
  const second = find("second");
  const every = [...(second?.options ?? [])].map((option) => option.value).filter((name) => name && name !== first);
  return shuffled([first, ...(second?.value === "" ? every : [second?.value ?? null])]);
}

/** An order that tells nothing: whose answer stands where is told after the verdict. */
function shuffled(names) {
  const drawn = crypto.getRandomValues(new Uint32Array(names.length));
  return names.map((name, at) => [drawn[at], name]).sort(([one], [other]) => one - other).map(([, name]) => name);
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

/** The answers' places, those together that say the same but for their spaces. */
function alike(outcomes) {
  const groups = new Map();
  outcomes.forEach(({ text }, at) => {
    const plain = text.split(/\s+/).join(" ").trim();
    groups.set(plain, [...(groups.get(plain) ?? []), at]);
  });
  return [...groups.values()];
}

/** Every verdict on groups of answers: what its button says, and the groups' ranks. */
function verdicts(groups) {
  const letters = groups.map((places) => places.map((at) => LETTERS[at]).join(" and "));
  const best = groups.length > 2 ? "best" : "better";
  const of = (group) => [`${letters[group]} ${groups[group].length > 1 ? "are" : "is"} ${best}`, groups.map((_, at) => (at === group ? 1 : 2))];
  const same = [groups.length > 2 ? "All alike" : "Both alike", groups.map(() => 1)];
  const all = groups.map((_, at) => of(at));
  return groups.length > 2 ? [...all, same] : [all[0], same, all[1]];
}

/** Ask which answer is best, of each group the first one; a conversation that is kept goes on from it, in `said`. */
function verdict(shown, outcomes, groups, said) {
  const asked = groups.length > 2 ? "Which is best?" : "Which is better?";
  const row = make("div", { className: "verdict", role: "group", ariaLabel: asked });
  const id = newId();
  const press = async (ranks) => {
    for (const button of row.querySelectorAll("button")) button.disabled = true;
    try {
      const body = { id, answers: groups.map(([at]) => outcomes[at].id), ranks, annotator: annotator() };
      const kept = await send("rankings", body, { late: (saved) => say(`Ranking ${saved.saved.number} is saved now.`) });
      const thanks = kept ? `Saved as ranking ${kept.saved.number}.` : "Not saved yet; it is sent again by itself.";
      row.replaceChildren(make("span", { className: "fine" }, thanks));
      shown.forEach((one, at) => reveal(one, outcomes[at]));
      const chosen = groups[ranks.indexOf(1)];
      if (ranks.includes(2)) for (const at of chosen) shown[at].element.classList.add("chosen");
      said.content = outcomes[chosen[0]].text;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      row.replaceChildren(make("span", { className: "problem" }, error.message));
    }
  };
  row.append(make("span", {}, asked), ...verdicts(groups).map(([word, ranks]) =>
    make("button", { type: "button", onclick: () => press(ranks) }, word)));
  return row;
}

async function ask(question) {
  const names = models();
  const set = Number(find("temperature").value);
  const temperature = names.length > 1 && names[0] === names[1] && set === 0 ? SPREAD : set;
  const messages = [...(find("remembers").checked ? history : []), { role: "user", content: question }];
  const shown = names.map((name, at) => reply(names.length > 1 ? `Answer ${LETTERS[at]}` : name ?? "Answer"));
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
  const groups = whole ? alike(outcomes) : [];
  if (groups.length > 1) {
    turn.append(verdict(shown, outcomes, groups, said));
  } else {
    const same = outcomes.length > 2 ? "All say the same." : "Both say the same.";
    if (whole && outcomes.length > 1) turn.append(make("p", { className: "fine" }, same));
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
