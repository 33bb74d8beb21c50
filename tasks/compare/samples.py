"""The samples page: what every model of a run replied to the same held-out questions, side by side.

It shows the questions that have sampled replies, and those whose verdict a step after the base model changed. All text
is escaped, and the content security policy allows only the page's own script, which filters the rows. The page is
readable without it. The page loads nothing, and its bytes depend only on the answers.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.compare import continuations
from tasks.compare.samples_page import PAGE, SCRIPT

Row = Mapping[str, Any]
SPLIT_LABELS = {"heldout": "held-out entity", "train": "seen entity"}
SHOWN_FIGURES = ("exact_match_heldout", "reward_mean", "win_rate")  # in the heading of a column
MAX_WORST_PROMPTS = 5  # prompts shown per category, with their continuations
VERDICTS = {1: "won", 0: "tied", -1: "lost"}  # the judge's comparison with the model before alignment


def page(
    models: Sequence[Row],
    answers: Mapping[str, Sequence[Row]],
    toxicity: Row | None = None,
) -> str:
    """Return the page as HTML.

    `models` are the scorecard rows of the causal models, `answers` the answer rows of each. A model without answers is
    named above the table and has no column. For an aligned model the judge compares each reply with that of the model
    before alignment. `toxicity` is the scorecard's section on continuations, or None.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": _share, "points": _points, "change": _change, "thousands": _thousands}
    columns = [{**dict.fromkeys(SHOWN_FIGURES), **row} for row in models if answers.get(row["model"])]
    names = [row["model"] for row in columns]
    answers_by_model = {name: _by_question(answers[name]) for name in names}
    worst = continuations.most_toxic({name: answers[name] for name in names}, MAX_WORST_PROMPTS) if toxicity else []
    question_ids = {name for questions in answers_by_model.values() for name in questions}
    rows = [_question_row(name, answers_by_model, {row["model"]: row for row in columns}) for name in question_ids]
    shown = sorted((row for row in rows if row["shown"]), key=lambda row: (row["split"] != "heldout", row["id"]))
    return environment.from_string(PAGE).render(
        columns=columns,
        absent=[row["model"] for row in models if row["model"] not in names],
        rows=shown,
        questions=len(question_ids),
        has_samples=any(cell["sampled"] for row in shown for cell in row["cells"]),
        changed=sum(row["changed"] for row in shown),
        toxicity=toxicity,
        worst=[_worst_prompt(item, names) for item in worst],
        script=SCRIPT,
        digest=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def _by_question(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return a model's greedy and sampled answers, grouped by question id."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] in ("greedy", "sampled"):
            found.setdefault(row["id"], []).append(row)
    return found


def _question_row(
    name: str, answers_by_model: Mapping[str, Mapping[str, Sequence[Row]]], models: Mapping[str, Row]
) -> dict[str, Any]:
    """Return the table row of one question, with one cell per model."""
    found = {model: questions.get(name, ()) for model, questions in answers_by_model.items()}
    first = next(row for rows in found.values() for row in rows)
    greedy = {model: next((row for row in rows if row["kind"] == "greedy"), None) for model, rows in found.items()}
    sampled = {model: [row for row in rows if row["kind"] == "sampled"] for model, rows in found.items()}
    after_pretraining = [model for model, row in models.items() if not row["made_by"].startswith("pretrain@")]
    verdicts = {row["correct"] for model, row in greedy.items() if row and model in after_pretraining}
    cells: list[dict[str, Any]] = []
    for model, row in greedy.items():
        against = str(models[model]["against"] or "")
        others = sampled.get(against, [])
        cells.append({
            "model": model, "against": against,
            "greedy": row and {"text": _clean(row["reply"]), "correct": row["correct"]},
            "same": bool(row and cells and cells[-1]["greedy"] and cells[-1]["greedy"]["text"] == _clean(row["reply"])),
            "sampled": [_sampled_reply(reply, *others[n : n + 1]) for n, reply in enumerate(sampled[model])],
        })  # fmt: skip
    aligned = [cell for cell in cells if models[cell["model"]]["made_by"].startswith("align@")]
    verdicts_of_judge = {reply["verdict"] for cell in aligned for reply in cell["sampled"]}
    changed = len(verdicts) > 1
    return {
        "id": name, "question": _clean(first["question"]), "reference": _clean(first["reference"] or ""),
        "split": first["split"], "side": SPLIT_LABELS[first["split"]], "cells": cells,
        "changed": changed, "shown": changed or any(sampled.values()),
        "of": [first["split"], *(["changed"] if changed else []), *sorted(verdicts_of_judge & {"won", "lost"})],
    }  # fmt: skip


def _sampled_reply(row: Row, other: Row | None = None) -> dict[str, Any]:
    """Return a sampled reply with its scores and the judge's comparison with `other`, the reply before alignment."""
    score, other_score = row["judge_score"], other and other["judge_score"]
    verdict = "" if score is None or other_score is None else VERDICTS[(score > other_score) - (score < other_score)]
    return {"text": _clean(row["reply"]), "reward": row["reward"], "judge_score": score, "verdict": verdict}


def _worst_prompt(item: Row, names: Sequence[str]) -> dict[str, Any]:
    """Return a prompt with each model's most toxic continuation."""
    found = [(name, item["models"][name]) for name in names if name in item["models"]]
    cells = [{"model": name, "text": _clean(row["reply"]), "toxicity": row["toxicity"]} for name, row in found]
    return {"category": item["category"], "prompt": _clean(item["prompt"]), "cells": cells}


def _clean(text: str) -> str:
    """Replace control characters, except line breaks, by spaces."""
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
    """Use a true minus sign, and no sign for a number that rounds to zero."""
    return text.replace("-", "−") if any(digit in text for digit in "123456789") else text.strip("+-")
