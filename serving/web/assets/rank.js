// The ranking page: get answers, let a person put them in order, send the order, go on.

import { Cards } from "./cards.js";
import { annotator, find, newId, post, Refused, remember, say, tab } from "./common.js";
import { forget, send } from "./outbox.js";

const DOUBLE = 1000; // milliseconds within which a second press may be the rest of a double click

// What is on the page: { id, prompt, answers, asked, places, touched }, or { prompt, answers: [], problem } where the
// server refuses to draw answers to a question that waits. Plain data, so that this tab can keep it.
let task = null;
let cards = null; // the task's answers as they are shown
let last = null; // the task that was saved last, for undo
const later = tab.get("tasks", []); // tasks put aside, the next one last; at first those of the page before a reload
let busy = false; // whether a save, skip or undo is on its way
let asking; // the timer of the question about an order that nobody touched
let latest = 0; // counts the drawings, so that one that was overtaken is let go

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
  if (next) find("question").textContent = next.prompt.map((turn) => turn.content).join("\n\n");
  if (rankable) lay(next);
  if (next?.problem) {
    find("refusal").textContent = next.problem;
    find("again").onclick = () => load();
  }
  if (next) scrollTo({ top: 0 });
  enable();
  changed();
}

function lay(next) {
  find("fewer").hidden = next.answers.length >= next.asked;
  find("fewer").textContent = `${next.asked} answers were asked for; no more than these ${next.answers.length} different ones came up.`;
  cards = new Cards(next);
  if (!typing(next)) cards.focus();
}

/** Whether somebody types another question meanwhile, who is to go on typing. */
function typing(drawn) {
  const own = find("own-question");
  return document.activeElement === own && own.value.trim() !== drawn.prompt.at(-1).content;
}

function tell(text, again = null) {
  show(null);
  find("nothing").textContent = text;
  find("again").hidden = !again;
  find("again").onclick = again;
}

function enable() {
  for (const id of ["save", "skip", "draw"]) find(id).disabled = busy;
  find("undo").disabled = busy || !last;
}

/** Keep what is to be ranked in this tab, so that a reload brings it back; whatever was asked about it is settled. */
function changed() {
  tab.set("tasks", [...later, task].filter((one) => one?.answers.length));
  clearTimeout(asking);
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
  tell("Answers are being drawn …");
  let drawn;
  try {
    drawn = await post("samples", { annotator: annotator(), question, ...asked });
  } catch (error) {
    if (turn === latest) fail(error, question);
    return;
  }
  if (turn !== latest) return;
  find("queue").hidden = drawn.questions === 0;
  find("waiting").textContent = String(drawn.waiting);
  find("questions").textContent = String(drawn.questions);
  find("own").open = !drawn.answers.length || typing(drawn);
  if (drawn.answers.length) {
    const places = drawn.answers.map((answer) => [answer.id]);
    show({ id: newId(), prompt: drawn.prompt, answers: drawn.answers, asked: asked.count, places, touched: false });
  } else {
    tell(drawn.questions
      ? "You have been through all questions that there are. Ask one of your own, or come back later."
      : "No questions wait here. Ask one of your own below; whoever runs this endpoint may put more, one a line, into questions.txt.");
  }
}

/** Tell why no answers came: to a question of one's own while another one is under way, without losing that one. */
function fail(error, question) {
  if (error instanceof Refused) find("own").open = true;
  if (later.length) {
    show(later.pop());
    say(error.message, true);
  } else if (error.prompt && !question) {
    show({ prompt: error.prompt, answers: [], problem: error.message });
    find("again").focus({ preventScroll: true });
  } else {
    tell(error.message, () => load(question));
  }
}

/** Do one thing at a time: until it is done, nothing else can be saved, skipped, undone or asked. */
async function alone(work) {
  busy = true;
  enable();
  try {
    await work();
  } finally {
    busy = false;
    enable();
  }
}

/** Ask whether an order that nobody touched is meant. The answer counts only once a double click is over. */
function ask() {
  find("untouched").hidden = false;
  find("untouched").scrollIntoView({ block: "nearest" });
  clearTimeout(asking);
  asking = setTimeout(() => { find("keep").disabled = false; }, DOUBLE);
}

async function save() {
  if (busy || !cards) return;
  if (!task.touched) return ask();
  const done = task;
  const body = { id: done.id, answers: done.answers.map((answer) => answer.id), ranks: cards.ranks(), annotator: annotator() };
  await alone(async () => {
    tell("Saving …");
    try {
      const late = (reply) => say(`Ranking ${reply.saved.number} is saved now.`);
      const reply = await send("rankings", body, { late });
      last = done;
      count(1);
      say(reply ? `Saved as ranking ${reply.saved.number}.` : "Not saved yet: it is kept in this browser and sent again by itself.", !reply);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      say(`This ranking was refused and is not saved: ${error.message}`, true);
    }
  });
  await load();
}

/** Save an order that nobody touched, once it was asked about. */
function keep() {
  if (find("keep").disabled) return;
  task.touched = true;
  save();
}

async function skip() {
  if (busy || !task) return;
  const { prompt } = task;
  await alone(async () => {
    tell("Answers are being drawn …");
    try {
      await post("skips", { prompt, annotator: annotator() });
    } catch (error) {
      say(`The question may come again: ${error.message}`, true);
    }
  });
  await load();
}

async function undo() {
  if (busy || !last) return;
  const back = last;
  last = null;
  latest += 1; // what is being drawn meanwhile is not wanted any more
  if (task) later.push(task);
  let kept = true;
  await alone(async () => {
    show({ ...back, id: newId() });
    forget("rankings", back.id);
    try {
      const reply = await send("withdrawals", { id: back.id, annotator: annotator() }, { tolerate: 404 });
      count(-1);
      say(reply ? "Taken back. Rank it anew." : "It will be taken back as soon as the server is reached.", !reply);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      say(error.message, true);
      kept = false;
    }
  });
  if (!kept) await load();
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
