// The ranking page: get answers, let a person put them in order, send the order, go on.

import { Cards } from "./cards.js";
import { annotator, find, newId, post, Refused, remember, say } from "./common.js";
import { forget, send } from "./outbox.js";

let task = null; // { id, prompt, answers, cards }: what is on the page
let last = null; // the task that was saved last, for undo
const later = []; // tasks put aside by an undo
let sure = false; // whether an order that nobody touched was asked about

const session = {
  get: () => { try { return Number(sessionStorage.getItem("bessemer.ranked") ?? 0); } catch { return 0; } },
  add(count) {
    try { sessionStorage.setItem("bessemer.ranked", String(this.get() + count)); } catch { /* not counted */ }
    find("session").textContent = String(this.get());
  },
};

function show(next) {
  task = next;
  sure = false;
  find("task").hidden = !next;
  find("nothing").hidden = Boolean(next);
  find("skip").disabled = find("save").disabled = !next;
  for (const id of ["undo", "undo-here"]) find(id).disabled = !last;
  find("undo-here").hidden = !last;
  if (!next) return;
  find("question").textContent = next.prompt.map((turn) => turn.content).join("\n\n");
  find("fewer").hidden = next.answers.length >= next.asked;
  find("fewer").textContent = `${next.asked} answers were asked for; no more than these ${next.answers.length} different ones came up.`;
  next.cards = new Cards(next.answers, next.cards?.order);
  next.cards.focus();
  scrollTo({ top: 0 });
}

function tell(text, again = false) {
  show(null);
  find("nothing-text").textContent = text;
  find("again").hidden = !again;
}

function settings() {
  const form = find("settings");
  const models = [...form.querySelectorAll("input[name=model]:checked")].map((box) => box.value);
  return {
    count: Number(form.elements.count.value), temperature: Number(form.elements.temperature.value),
    models: models.length ? models : null,
  };
}

let latest = 0;
async function load(question = null) {
  if (!question && later.length) return show(later.pop());
  const turn = ++latest;
  const asked = settings();
  tell("Answers are being drawn …");
  try {
    const drawn = await post("samples", { annotator: annotator(), question, ...asked });
    if (turn !== latest) return;
    find("queue").hidden = drawn.questions === 0;
    find("waiting").textContent = String(drawn.waiting);
    find("questions").textContent = String(drawn.questions);
    if (drawn.answers.length) {
      find("own").open = false;
      show({ id: newId(), prompt: drawn.prompt, answers: drawn.answers, asked: asked.count });
    } else {
      find("own").open = true;
      tell(drawn.questions
        ? "You have been through all questions that there are. Ask one of your own, or come back later."
        : "No questions wait here. Ask one of your own below; whoever runs this endpoint may put more, one a line, into questions.txt.");
    }
  } catch (error) {
    if (turn !== latest) return;
    if (error instanceof Refused) find("own").open = true;
    tell(error.message, true);
    find("again").onclick = () => load(question);
  }
}

async function save() {
  if (!task) return;
  if (!task.cards.touched && !sure) {
    sure = true;
    say("Nothing was moved. Save once more to keep the order as it stands.");
    return;
  }
  const done = task;
  show(null);
  find("nothing-text").textContent = "Saving …";
  const body = { id: done.id, answers: done.answers.map((answer) => answer.id), ranks: done.cards.ranks(), annotator: annotator() };
  try {
    const late = (reply) => say(`Ranking ${reply.saved.number} is saved now.`);
    const reply = await send("rankings", body, { late });
    last = done;
    session.add(1);
    if (reply) find("status").dataset.saved = reply.saved.id;
    say(reply ? `Saved as ranking ${reply.saved.number}.` : "Not saved yet: it is kept in this browser and sent again by itself.", !reply);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(`This ranking was refused and is not saved: ${error.message}`, true);
  }
  await load();
}

async function skip() {
  if (!task) return;
  const { prompt } = task;
  tell("Answers are being drawn …");
  try {
    await post("skips", { prompt, annotator: annotator() });
  } catch (error) {
    say(`The question may come again: ${error.message}`, true);
  }
  await load();
}

async function undo() {
  if (!last) return;
  const back = last;
  last = null;
  latest += 1; // what is being drawn meanwhile is not wanted any more
  if (task) later.push(task);
  try {
    forget("rankings", back.id);
    const reply = await send("withdrawals", { id: back.id, annotator: annotator() }, { tolerate: 404 });
    session.add(-1);
    say(reply ? "Taken back. Rank it anew." : "It will be taken back as soon as the server is reached.", !reply);
    show({ ...back, id: newId() });
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(error.message, true);
    await load();
  }
}

remember(find("settings"), "ranking");
session.add(0);
find("save").addEventListener("click", save);
find("skip").addEventListener("click", skip);
find("undo").addEventListener("click", undo);
find("undo-here").addEventListener("click", undo);
find("again").onclick = () => load();
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = find("own-question").value.trim();
  if (!question) return find("own-question").focus();
  if (task) later.push(task);
  load(question);
});
addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if (event.repeat) return;
  if (event.target === find("own-question")) find("ask").requestSubmit();
  else save();
});
load();
