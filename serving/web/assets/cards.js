// The ordered list of answers: cards that can be dragged or moved with the keyboard.

import { find, make, say } from "./common.js";
import { flagButton } from "./opinions.js";
import { Order } from "./order.js";

const TIE_SHARE = 0.4; // middle share of a card's height where a drop makes a tie; elsewhere it goes before or after

export class Cards {
  /**
   * Show the answers `[{id, text, flagged}]` of a task in the order of its `places`. A move updates `places`, sets
   * `touched`, and dispatches a `change` event on the list.
   */
  constructor(task) {
    const { answers, places } = task;
    this.task = task;
    this.order = new Order(places);
    this.list = find("places");
    this.letters = new Map(answers.map((answer, at) => [answer.id, "ABCDEF"[at]]));
    this.cards = new Map(answers.map((answer) => [answer.id, this.#card(answer)]));
    this.draw();
  }

  ranks() {
    return this.order.ranks(this.task.answers.map((answer) => answer.id));
  }

  focus() {
    this.cards.get(this.order.keys()[0]).focus({ preventScroll: true });
  }

  draw() {
    const focused = document.activeElement;
    this.list.replaceChildren(...this.order.places.map((keys, at) => {
      const cards = make("div", { className: "cards" }, ...keys.map((key) => this.cards.get(key)));
      const rank = make("div", { className: "rank", ariaHidden: "true" }, String(at + 1));
      if (keys.length > 1) rank.append(make("small", {}, "tie"));
      return make("li", { className: keys.length > 1 ? "place tied" : "place" }, rank, cards);
    }));
    for (const [key, card] of this.cards) card.setAttribute("aria-label", this.#describe(key));
    if (focused && this.list.contains(focused)) focused.focus({ preventScroll: true });
  }

  #describe(key) {
    const at = this.order.placeOf(key);
    const others = this.order.places[at].filter((other) => other !== key).map((other) => this.letters.get(other));
    const tie = others.length ? `, tied with ${others.join(" and ")}` : "";
    return `Answer ${this.letters.get(key)}: place ${at + 1} of ${this.order.places.length}${tie}`;
  }

  #moved(key, moved) {
    const focused = document.activeElement;
    if (moved) this.task.touched = true;
    this.draw();
    if (focused && focused !== document.body) focused.focus({ preventScroll: true });
    this.cards.get(key).scrollIntoView({ block: "nearest" });
    say(moved ? `${this.#describe(key)}.` : `${this.#describe(key)} already.`);
    if (moved) this.list.dispatchEvent(new Event("change"));
  }

  #card(answer) {
    const key = answer.id;
    const letter = this.letters.get(key);
    const tool = (sign, label, work) =>
      make("button", { type: "button", className: "quiet", title: label, "aria-label": `${label}: answer ${letter}`, onclick: work }, sign);
    const grip = make("div", { className: "grip", ariaHidden: "true", title: "Drag" }, "⠿");
    const text = `text-${letter}`; // the card's description, read by screen readers
    const card = make("div", { className: "card", tabIndex: 0, role: "group", "aria-describedby": text }, grip,
      make("p", { className: "text", id: text }, answer.text),
      make("div", { className: "tools" },
        make("span", { className: "letter" }, `Answer ${letter}`),
        tool("▲", "Up", () => this.#moved(key, this.order.step(key, -1))),
        tool("▼", "Down", () => this.#moved(key, this.order.step(key, 1))),
        tool("=", "Tie with the one above, or end the tie", () => this.#moved(key, this.order.tie(key))),
        flagButton(answer, `answer ${letter}`)));
    card.addEventListener("keydown", (event) => this.#key(event, key));
    grip.addEventListener("pointerdown", (event) => this.#drag(event, key));
    return card;
  }

  #key(event, key) {
    const card = this.cards.get(key);
    if (event.target !== card || event.ctrlKey || event.metaKey || event.altKey) return;
    const direction = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (direction && event.shiftKey) {
      this.#moved(key, this.order.step(key, direction));
    } else if (direction) {
      const keys = this.order.keys();
      this.cards.get(keys[keys.indexOf(key) + direction])?.focus();
    } else if (event.key === "=") {
      this.#moved(key, this.order.tie(key));
    } else {
      return;
    }
    event.preventDefault();
  }

  #drag(event, key) {
    if (event.button !== 0) return;
    event.preventDefault();
    const grip = event.currentTarget;
    const card = this.cards.get(key);
    const from = event.clientY + scrollY;
    let drop = null;
    grip.setPointerCapture(event.pointerId);
    card.classList.add("dragged");
    const move = (moving) => {
      card.style.transform = `translateY(${moving.clientY + scrollY - from}px)`;
      if (moving.clientY < 60) scrollBy(0, -12);
      if (moving.clientY > innerHeight - 60) scrollBy(0, 12);
      drop = this.#target(moving.clientY, key);
      this.#mark(drop);
    };
    const end = (ended) => {
      grip.removeEventListener("pointermove", move);
      grip.removeEventListener("pointerup", end);
      grip.removeEventListener("pointercancel", end);
      removeEventListener("keydown", escape);
      card.classList.remove("dragged");
      card.style.transform = "";
      this.#mark(null);
      if (ended.type === "pointerup" && drop) this.#moved(key, this.order.put(key, drop.key, drop.where));
    };
    const escape = (pressed) => { if (pressed.key === "Escape") end(pressed); };
    grip.addEventListener("pointermove", move);
    grip.addEventListener("pointerup", end);
    grip.addEventListener("pointercancel", end);
    addEventListener("keydown", escape);
  }

  /** The drop target of a card: on the nearest other card, or before or after that card's rank. */
  #target(y, key) {
    let nearest = null;
    for (const [other, card] of this.cards) {
      if (other === key) continue;
      const box = card.getBoundingClientRect();
      const away = Math.abs(y - (box.top + box.height / 2)) - box.height / 2;
      if (nearest === null || away < nearest.away) nearest = { key: other, away, box };
    }
    if (nearest === null) return null;
    const part = (y - nearest.box.top) / nearest.box.height;
    const where = part < (1 - TIE_SHARE) / 2 ? "before" : part > (1 + TIE_SHARE) / 2 ? "after" : "on";
    return { key: nearest.key, where };
  }

  #mark(drop) {
    for (const marked of this.list.querySelectorAll(".drop-on, .drop-before, .drop-after")) {
      marked.classList.remove("drop-on", "drop-before", "drop-after");
    }
    if (!drop) return;
    const card = this.cards.get(drop.key);
    (drop.where === "on" ? card : card.closest(".place")).classList.add(`drop-${drop.where}`);
  }
}
