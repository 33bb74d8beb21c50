// The ranking page: sample answers, let the annotator order them, send the ranking, load the next question.

import { Cards } from "./cards.js";
import { annotator, find, newId, post, RejectedError, remember, say, tab } from "./common.js";
import { forget, send } from "./outbox.js";

const LONG_CHARACTERS = 600; // a longer question is shortened, so that the answers are on the screen
const SHORT_TURN_CHARACTERS = 150; // shown of every turn of a conversation
const SPEAKERS = { system: "Instructions", user: "User", assistant: "Assistant" };
const DOUBLE_CLICK_MS = 1000; // a second press within this time may belong to a double click

// The current task: { id, prompt, answers, asked, places, touched }, or { prompt, answers: [], problem } if the server
// rejects a waiting question. Plain data, so that it can be stored in this tab.
let task = null;
let cards = null; // the cards of the current task
let last = null; // the last saved task, for undo
const later = tab.get("tasks", []); // postponed tasks, the next one last; restored after a reload
let busy = false; // whether a save, skip or undo is in progress
let confirmTimer; // delays the confirmation of an untouched order
let latest = 0; // number of the latest sample request; replies to earlier ones are dropped

function show(next) {
  task = next;
  const rankable = Boolean(next?.answers.length);
  find("task").hidden = !next;
  find("nothing").hidden = Boolean(next);
  find("ranking").hidden = find("save").hidden = !rankable;
  find("refusal").hidden = find("again").hidden = !next?.problem;
  find("skip").hidden = !next;
  find("undo").hidden = !next && !last;
  cards = null;
  if (next) showQuestion(next.prompt);
  if (rankable) showCards(next);
  if (next?.problem) {
    find("refusal").textContent = next.problem;
    find("again").onclick = () => load();
  }
  if (next) scrollTo({ top: 0 });
  enable();
  changed();
}

/** Show a prompt, with its speakers if there are several; long turns are shortened until the reader wants all. */
function showQuestion(prompt) {
  const limit = Math.max(SHORT_TURN_CHARACTERS, LONG_CHARACTERS / prompt.length);
  const clip = (text) => (text.length > limit ? `${text.slice(0, limit).trimEnd()} …` : text);
  const written = (form) => prompt
    .map((turn) => (prompt.length > 1 ? `${SPEAKERS[turn.role]}: ${form(turn.content)}` : form(turn.content)))
    .join("\n\n");
  find("question").textContent = written(clip);
  find("whole").hidden = prompt.every((turn) => turn.content.length <= limit);
  find("whole").onclick = () => {
    find("question").textContent = written((text) => text);
    find("whole").hidden = true;
  };
}

function showCards(next) {
  find("fewer").hidden = next.answers.length >= next.asked;
  find("fewer").textContent = `${next.asked} answers were requested; the models gave only these ${next.answers.length} different ones.`;
  cards = new Cards(next);
  if (!isTyping(next)) cards.focus();
}

/** Whether the user is typing another question; the focus stays there then. */
function isTyping(sampled) {
  const own = find("own-question");
  return document.activeElement === own && own.value.trim() !== sampled.prompt.at(-1).content;
}

function showMessage(text, retry = null) {
  show(null);
  find("nothing").textContent = text;
  find("again").hidden = !retry;
  find("again").onclick = retry;
}

function enable() {
  for (const id of ["save", "skip", "draw"]) find(id).disabled = busy;
  find("undo").disabled = busy || !last;
}

/** Store the tasks in this tab, so that a reload restores them, and close the confirmation of an untouched order. */
function changed() {
  tab.set("tasks", [...later, task].filter((one) => one?.answers.length));
  clearTimeout(confirmTimer);
  find("untouched").hidden = find("keep").disabled = true;
}

function count(ranked) {
  tab.set("ranked", tab.get("ranked", 0) + ranked);
  find("session").textContent = String(tab.get("ranked", 0));
}

function settings() {
  const form = find("settings");
  const models = [...form.querySelectorAll("input[name=model]:checked")].map((box) => box.value);
  return {
    count: Number(form.elements.count.value), temperature: Number(form.elements.temperature.value),
    models: models.length ? models : null,
  };
}

async function load(question = null) {
  if (!question && later.length) {
    find("own").open = false;
    return show(later.pop());
  }
  const turn = ++latest;
  const asked = settings();
  showMessage("Generating answers …");
  let sampled;
  try {
    sampled = await post("samples", { annotator: annotator(), question, ...asked });
  } catch (error) {
    if (turn === latest) fail(error, question);
    return;
  }
  if (turn !== latest) return;
  find("queue").hidden = sampled.questions === 0;
  find("waiting").textContent = String(sampled.waiting);
  find("questions").textContent = String(sampled.questions);
  find("own").open = !sampled.answers.length || isTyping(sampled);
  if (sampled.answers.length) {
    const places = sampled.answers.map((answer) => [answer.id]);
    show({ id: newId(), prompt: sampled.prompt, answers: sampled.answers, asked: asked.count, places, touched: false });
  } else {
    showMessage(sampled.questions
      ? "You have ranked or skipped all questions. Ask your own, or come back later."
      : "No questions are waiting. Ask your own below, or add questions to questions.txt, one per line.");
  }
}

/** Show why no answers were sampled; a postponed task is shown again. */
function fail(error, question) {
  if (error instanceof RejectedError) find("own").open = true;
  if (later.length) {
    show(later.pop());
    say(error.message, true);
  } else if (error.prompt && !question) {
    show({ prompt: error.prompt, answers: [], problem: error.message });
    find("again").focus({ preventScroll: true });
  } else {
    showMessage(error.message, () => load(question));
  }
}

/** Run `work` with the buttons disabled: no other save, skip, undo or question until it is done. */
async function runExclusive(work) {
  busy = true;
  enable();
  try {
    await work();
  } finally {
    busy = false;
    enable();
  }
}

/** Ask for confirmation of an untouched order. The button is enabled after the time of a double click. */
function confirmUntouched() {
  find("untouched").hidden = false;
  find("untouched").scrollIntoView({ block: "nearest" });
  clearTimeout(confirmTimer);
  confirmTimer = setTimeout(() => { find("keep").disabled = false; }, DOUBLE_CLICK_MS);
}

async function save() {
  if (busy || !cards) return;
  if (!task.touched) return confirmUntouched();
  const done = task;
  const body = { id: done.id, answers: done.answers.map((answer) => answer.id), ranks: cards.ranks(), annotator: annotator() };
  await runExclusive(async () => {
    showMessage("Saving …");
    try {
      const late = (reply) => say(`Ranking ${reply.saved.number} is saved now.`);
      const reply = await send("rankings", body, { late });
      last = done;
      count(1);
      say(reply ? `Saved as ranking ${reply.saved.number}.` : "Not saved yet: kept in this browser and retried automatically.", !reply);
    } catch (error) {
      if (!(error instanceof RejectedError)) throw error;
      say(`This ranking was rejected and is not saved: ${error.message}`, true);
    }
  });
  await load();
}

/** Save an untouched order after confirmation. */
function keep() {
  if (find("keep").disabled) return;
  task.touched = true;
  save();
}

async function skip() {
  if (busy || !task) return;
  const { prompt } = task;
  await runExclusive(async () => {
    showMessage("Generating answers …");
    try {
      await post("skips", { prompt, annotator: annotator() });
    } catch (error) {
      say(`The question may be shown again: ${error.message}`, true);
    }
  });
  await load();
}

async function undo() {
  if (busy || !last) return;
  const back = last;
  last = null;
  latest += 1; // drop the reply to a pending sample request
  if (task) later.push(task);
  let withdrawn = true;
  await runExclusive(async () => {
    show({ ...back, id: newId() });
    forget("rankings", back.id);
    try {
      const reply = await send("withdrawals", { id: back.id, annotator: annotator() }, { tolerate: 404 });
      count(-1);
      say(reply ? "Taken back. Rank it again." : "It will be taken back when the server is reachable.", !reply);
    } catch (error) {
      if (!(error instanceof RejectedError)) throw error;
      say(error.message, true);
      withdrawn = false;
    }
  });
  if (!withdrawn) await load();
}

remember(find("settings"), "ranking");
count(0);
find("places").addEventListener("change", changed);
find("save").addEventListener("click", save);
find("keep").addEventListener("click", keep);
find("skip").addEventListener("click", skip);
find("undo").addEventListener("click", undo);
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = find("own-question").value.trim();
  if (busy) return;
  if (!question) return find("own-question").focus();
  if (task) later.push(task);
  load(question);
});
addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if (event.repeat) return;
  if (event.target === find("own-question")) find("ask").requestSubmit();
  else if (find("untouched").hidden) save();
  else keep();
});
load();
