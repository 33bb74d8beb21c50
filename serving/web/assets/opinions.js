// Thumbs and flags on single answers; they are stored separately from the rankings.

import { annotator, find, make, newId, RejectedError, say } from "./common.js";
import { send } from "./outbox.js";

async function sendOpinion(answer, opinion, thanks, note = "") {
  try {
    const saved = await send("opinions", { id: newId(), answer, opinion, annotator: annotator(), note });
    say(saved ? thanks : "Not saved yet; it will be sent again.");
    return true;
  } catch (error) {
    if (!(error instanceof RejectedError)) throw error;
    say(error.message, true);
    return false;
  }
}

function mark(buttons, pressed) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === pressed));
}

/**
 * A button that flags an answer after asking for a note; pressed again it removes the flag.
 * The state is stored in `answer.flagged`, and the button dispatches a `change` event.
 */
export function flagButton(answer, label) {
  const setFlagged = (now) => {
    answer.flagged = now;
    mark([button], now ? button : null);
    button.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const press = async () => {
    if (answer.flagged) {
      if (await sendOpinion(answer.id, "unflag", "The flag is removed.")) setFlagged(false);
      return;
    }
    const dialog = find("flag");
    find("flag-note").value = "";
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
    if (dialog.returnValue !== "flag") return;
    if (await sendOpinion(answer.id, "flag", "Flagged. Thank you.", find("flag-note").value.trim())) setFlagged(true);
  };
  const properties = { type: "button", className: "quiet", "aria-pressed": String(Boolean(answer.flagged)), "aria-label": `Flag ${label}` };
  const button = make("button", { ...properties, title: "Flag", onclick: press }, "⚑");
  return button;
}

document.addEventListener("keydown", (event) => {
  const dialog = find("flag");
  if (!dialog.open || event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  event.stopPropagation(); // the page behind the dialog handles these keys too
  if (event.repeat) return;
  dialog.querySelector("form").requestSubmit(event.target.closest("button") ?? dialog.querySelector(".primary"));
});

const SVG = "http://www.w3.org/2000/svg";
const THUMB = "M3 10h4v11H3zM7 10l4-8c2 0 3 1.2 3 3v4h5c1.6 0 2.4 1.3 2 2.8l-1.8 6.9C18.9 20.1 18 21 16.6 21H7";

function thumb(side) {
  const icon = document.createElementNS(SVG, "svg");
  icon.setAttribute("viewBox", "0 0 24 24");
  icon.setAttribute("class", `thumb ${side}`);
  icon.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", THUMB);
  icon.append(path);
  return icon;
}

/** Thumbs up and down; pressing the active one withdraws it. */
export function thumbs(answer, label) {
  const buttons = [["up", "Good"], ["down", "Bad"]].map(([opinion, word]) => {
    const press = async () => {
      const back = button.getAttribute("aria-pressed") === "true";
      const thanks = back ? "Taken back." : "Saved. Thank you.";
      if (await sendOpinion(answer, back ? "none" : opinion, thanks)) mark(buttons, back ? null : button);
    };
    const properties = { type: "button", className: "quiet", "aria-pressed": "false", "aria-label": `${word}: ${label}` };
    const button = make("button", { ...properties, title: word, onclick: press }, thumb(opinion));
    return button;
  });
  return buttons;
}
