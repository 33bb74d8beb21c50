"""The page of samples: what every model of a run replied to the same held-out questions, side by side, for people.

It shows the questions that have sampled replies, and those whose verdict a step after the base model changed; all
others were judged alike. Every text is shown as text: escaped, and under a policy by which only the page's own
script runs, which filters rows and is not needed to read them. The page loads nothing and its bytes hang on the
answers alone.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.common.evaluation import continuations
from tasks.common.evaluation.samples_page import PAGE, SCRIPT

Row = Mapping[str, Any]
SIDES = {"heldout": "held-out entity", "train": "tuned entity"}
WORST = 5  # prompts of a category that are shown with their continuations
VERDICTS = {1: "won", 0: "tied", -1: "lost"}  # against the tuned model, by the judge


def page(
    models: Sequence[Row],
    answers: Mapping[str, Sequence[Row]],
    judged: Sequence[str],
    toxicity: Row | None = None,
) -> str:
    """Return the page. `models` are the sheet's rows of the decoders in chain order, `answers` each one's replies.

    A model without replies has no column and is named; `judged` are those whose replies the judge compares with the
    tuned model's. `toxicity` is what the joined sheet says of continuations, where there are any.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": _share, "points": _points, "change": _change, "thousands": _thousands}
    columns = [row for row in models if answers.get(row["model"])]
    names = [row["model"] for row in columns]
    sheets = {name: _by_question(answers[name]) for name in names}
    worst = continuations.most_toxic({name: answers[name] for name in names}, WORST) if toxicity else []
    asked = {name for sheet in sheets.values() for name in sheet}
    rows = [_row(name, sheets, judged) for name in asked]
    shown = sorted((row for row in rows if row["shown"]), key=lambda row: (row["split"] != "heldout", row["id"]))
    return environment.from_string(PAGE).render(
        columns=columns,
        absent=[row["model"] for row in models if row["model"] not in names],
        rows=shown,
        asked=len(asked),
        drawn=any(cell["drawn"] for row in shown for cell in row["cells"]),
        turned=sum(row["turned"] for row in shown),
        toxicity=toxicity,
        worst=[_worst(item, names) for item in worst],
        script=SCRIPT,
        digest=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def _by_question(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return a model's rows by the id of their question."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] in ("greedy", "sampled"):
            found.setdefault(row["id"], []).append(row)
    return found


def _row(name: str, sheets: Mapping[str, Mapping[str, Sequence[Row]]], judged: Sequence[str]) -> dict[str, Any]:
    """Return what the page shows of one question: a cell a model."""
    found = {model: sheet.get(name, ()) for model, sheet in sheets.items()}
    first = next(row for rows in found.values() for row in rows)
    greedy = {model: next((row for row in rows if row["kind"] == "greedy"), None) for model, rows in found.items()}
    drawn = {model: [row for row in rows if row["kind"] == "sampled"] for model, rows in found.items()}
    verdicts = {row["correct"] for model, row in greedy.items() if row and model != "base"}
    cells: list[dict[str, Any]] = []
    for model, row in greedy.items():
        tuned = drawn.get("tuned", []) if model in judged else []
        cells.append({
            "model": model,
            "greedy": row and {"text": _clean(row["reply"]), "correct": row["correct"]},
            "same": bool(row and cells and cells[-1]["greedy"] and cells[-1]["greedy"]["text"] == _clean(row["reply"])),
            "drawn": [_drawn(reply, *tuned[place : place + 1]) for place, reply in enumerate(drawn[model])],
        })  # fmt: skip
    against = {reply["verdict"] for cell in cells if cell["model"] == "policy" for reply in cell["drawn"]}
    turned = len(verdicts) > 1
    return {
        "id": name, "question": _clean(first["question"]), "wanted": _clean(first["wanted"]), "split": first["split"],
        "side": SIDES[first["split"]], "cells": cells, "turned": turned, "shown": turned or any(drawn.values()),
        "of": [first["split"], *(["turned"] if turned else []), *sorted(against & {"won", "lost"})],
    }  # fmt: skip


def _drawn(row: Row, tuned: Row | None = None) -> dict[str, Any]:
    """Return a sampled reply with its scores, and whether the judge prefers it to the tuned model's."""
    mine, theirs = row["judged"], tuned and tuned["judged"]
    verdict = "" if mine is None or theirs is None else VERDICTS[(mine > theirs) - (mine < theirs)]
    return {"text": _clean(row["reply"]), "reward": row["reward"], "judged": mine, "verdict": verdict}


def _worst(item: Row, names: Sequence[str]) -> dict[str, Any]:
    """Return a prompt with each model's most toxic continuation."""
    found = [(name, item["models"][name]) for name in names if name in item["models"]]
    cells = [{"model": name, "text": _clean(row["reply"]), "toxicity": row["toxicity"]} for name, row in found]
    return {"category": item["category"], "prompt": _clean(item["prompt"]), "cells": cells}


def _clean(text: str) -> str:
    """Return text without control characters, which a browser would swallow or obey."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _change(value: float) -> str:
    return _signed(f"{100 * value:+.1f}")


def _points(value: float | None) -> str:
    return "–" if value is None else _signed(f"{value:+.2f}")


def _thousands(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _signed(text: str) -> str:
    """Give a number a true minus sign, and none to what was rounded to zero."""
    return text.replace("-", "−") if any(digit in text for digit in "123456789") else text.strip("+-")
