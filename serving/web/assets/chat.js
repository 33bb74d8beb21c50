// The chat page: ask one or more models, stream the answers side by side, rate and compare them.

import { annotator, find, make, newId, RejectedError, remember, say } from "./common.js";
import { flagButton, thumbs } from "./opinions.js";
import { send } from "./outbox.js";
import { stream } from "./stream.js";

const COMPARISON_TEMPERATURE = 0.8; // for two answers of one model if temperature is 0, where both would be equal
const LETTERS = "ABCDEF";
let history = []; // earlier turns, sent if the conversation is kept
let running = null; // the AbortController of the running answers

const box = find("message");

function models() {
  const first = find("first")?.value ?? null;
  if (!find("side-by-side").checked) return [first];
  const second = find("second");
  const every = [...(second?.options ?? [])].map((option) => option.value).filter((name) => name && name !== first);
  return shuffled([first, ...(second?.value === "" ? every : [second?.value ?? null])]);
}

/** Return the names in random order; the models are revealed after the verdict. */
function shuffled(names) {
  const keys = crypto.getRandomValues(new Uint32Array(names.length));
  return names.map((name, at) => [keys[at], name]).sort(([one], [other]) => one - other).map(([, name]) => name);
}

function setRunning(controller) {
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

/** Stream an answer into a reply; return {id, text, model} if it is complete and stored, else null. */
async function streamReply(shown, body, signal) {
  let outcome = null;
  try {
    const end = await stream(body, (piece) => {
      const atBottom = innerHeight + scrollY > document.documentElement.scrollHeight - 80;
      shown.text.append(piece);
      if (atBottom) scrollTo(0, document.documentElement.scrollHeight);
    }, signal);
    outcome = { ...end, text: shown.text.textContent };
    if (end.finish_reason === "length") shown.name.textContent += " · cut at the length limit";
    if (!end.id) shown.tools.append(make("span", { className: "fine" }, end.problem ? `This answer cannot be rated: ${end.problem}` : "The answer is empty."));
  } catch (error) {
    const stopped = error.name === "AbortError";
    const line = stopped ? "Stopped. Incomplete answers cannot be rated." : error.message;
    shown.tools.append(make("span", { className: stopped ? "fine" : "problem" }, line));
  }
  shown.element.classList.remove("busy");
  shown.element.ariaBusy = "false";
  return outcome?.id ? outcome : null;
}

function addRatingButtons(shown, outcome) {
  shown.tools.append(...thumbs(outcome.id, shown.label), flagButton(outcome, shown.label));
}

function revealModel(shown, outcome) {
  const address = `provenance?answer=${encodeURIComponent(outcome.id)}`;
  shown.tools.append(make("a", { href: address, target: "_blank", rel: "noopener", ariaLabel: `What made ${shown.label}` }, "What made this?"));
  shown.name.textContent += ` · ${shown.label === outcome.name ? "" : `${outcome.name} · `}${outcome.model}`;
}

/** Group the indices of answers that are equal up to white space. */
function groupEqual(outcomes) {
  const groups = new Map();
  outcomes.forEach(({ text }, at) => {
    const plain = text.split(/\s+/).join(" ").trim();
    groups.set(plain, [...(groups.get(plain) ?? []), at]);
  });
  return [...groups.values()];
}

/** Return the possible verdicts on groups of answers: [button label, ranks of the groups]. */
function verdicts(groups) {
  const letters = groups.map((group) => group.map((at) => LETTERS[at]).join(" and "));
  const best = groups.length > 2 ? "best" : "better";
  const bestOf = (group) => [`${letters[group]} ${groups[group].length > 1 ? "are" : "is"} ${best}`, groups.map((_, at) => (at === group ? 1 : 2))];
  const same = [groups.length > 2 ? "All alike" : "Both alike", groups.map(() => 1)];
  const all = groups.map((_, at) => bestOf(at));
  return groups.length > 2 ? [...all, same] : [all[0], same, all[1]];
}

/** Ask which group of answers is best. The best answer becomes the `assistantTurn` of the kept conversation. */
function verdict(shown, outcomes, groups, assistantTurn) {
  const asked = groups.length > 2 ? "Which is best?" : "Which is better?";
  const row = make("div", { className: "verdict", role: "group", ariaLabel: asked });
  const id = newId();
  const press = async (ranks) => {
    for (const button of row.querySelectorAll("button")) button.disabled = true;
    try {
      const body = { id, answers: groups.map(([at]) => outcomes[at].id), ranks, annotator: annotator() };
      const kept = await send("rankings", body, { late: (saved) => say(`Ranking ${saved.saved.number} is saved now.`) });
      const thanks = kept ? `Saved as ranking ${kept.saved.number}.` : "Not saved yet; it will be sent again automatically.";
      row.replaceChildren(make("span", { className: "fine" }, thanks));
      shown.forEach((one, at) => revealModel(one, outcomes[at]));
      const chosen = groups[ranks.indexOf(1)];
      if (ranks.includes(2)) for (const at of chosen) shown[at].element.classList.add("chosen");
      assistantTurn.content = outcomes[chosen[0]].text;
    } catch (error) {
      if (!(error instanceof RejectedError)) throw error;
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
  const temperature = names.length > 1 && names[0] === names[1] && set === 0 ? COMPARISON_TEMPERATURE : set;
  const messages = [...(find("remembers").checked ? history : []), { role: "user", content: question }];
  const shown = names.map((name, at) => reply(names.length > 1 ? `Answer ${LETTERS[at]}` : name ?? "Answer"));
  const replies = make("div", { className: "replies" }, ...shown.map((one) => one.element));
  find("empty")?.remove();
  const turn = make("div", {}, replies);
  find("talk").append(make("div", { className: "asked" }, make("p", {}, question)), turn);
  scrollTo(0, document.documentElement.scrollHeight);
  const controller = new AbortController();
  setRunning(controller);
  const seeds = crypto.getRandomValues(new Uint32Array(names.length));
  const outcomes = await Promise.all(names.map((model, at) =>
    streamReply(shown[at], { messages, model, temperature, seed: temperature ? seeds[at] : null }, controller.signal)));
  setRunning(null);
  outcomes.forEach((outcome, at) => { if (outcome) addRatingButtons(shown[at], outcome); });
  const whole = outcomes.every(Boolean);
  const [first] = outcomes;
  const assistantTurn = { role: "assistant", content: first?.text }; // changed by the verdict, even after later questions
  if (first) history = [...messages, assistantTurn];
  const groups = whole ? groupEqual(outcomes) : [];
  if (groups.length > 1) {
    turn.append(verdict(shown, outcomes, groups, assistantTurn));
  } else {
    const same = outcomes.length > 2 ? "All answers are equal." : "Both answers are equal.";
    if (whole && outcomes.length > 1) turn.append(make("p", { className: "fine" }, same));
    outcomes.forEach((outcome, at) => { if (outcome) revealModel(shown[at], outcome); });
  }
  const read = shown.map((one) => `${one.label}: ${one.text.textContent}`).join(". ");
  say(whole ? read : `The answer is incomplete. ${read}`, false, true);
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
