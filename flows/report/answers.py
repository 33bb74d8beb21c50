"""The section "Answers" of the run report: every model's replies to the same questions (`data/evaluate/*/answers`).

Questions are sorted by id, which is a hash of their text. So the choice is arbitrary and the same in every report.
"""

from collections.abc import Sequence

from markupsafe import Markup

from flows.records import SAMPLES_PATH
from flows.report import plots
from flows.report.parts import Part
from flows.report.scorecard import COLOURS, colours
from flows.results import Results

SPLIT_TITLES = (("Seen in training", "train"), ("Held-out questions", "heldout"))
MAX_QUESTIONS = 6  # per split
MAX_CHANGED_QUESTIONS = 6
MAX_SAMPLED_REPLIES = 6
MAX_MASKED_STATEMENTS = 10
MAX_REPLY_CHARACTERS = 280


def answers(run: Results) -> Part:
    """Return greedy answers, those whose verdict changed between models, sampled replies with rewards, masked names."""
    answers_by_model = {name: rows for name in _evaluated_models(run) if (rows := _read_answers(run, name))}
    greedy = {name: _of_kind(rows, "greedy") for name, rows in answers_by_model.items()}
    greedy = {name: rows for name, rows in greedy.items() if rows}
    masked = {name: found for name, rows in answers_by_model.items() if (found := _of_kind(rows, "masked"))}
    makers = {str(model["model"]): str(model.get("made_by")) for model in run.scorecard.get("models", [])}
    sampled = {
        name: found
        for name, rows in answers_by_model.items()
        if not makers.get(name, "").startswith("prune@") and (found := _of_kind(rows, "sampled"))
    }
    if not answers_by_model:
        return {}
    shared_ids = _shared_ids(greedy)
    after_pretraining = [name for name in greedy if not makers.get(name, "").startswith("pretrain@")]
    changed, colour = [name for name in shared_ids if _verdict_changed(greedy, name, after_pretraining)], colours(run)
    questions_by_split = {
        title: _distinct_entities(greedy, [name for name in shared_ids if _first_model(greedy)[name]["split"] == split])
        for title, split in SPLIT_TITLES
    }
    shown_ids = {name for names in questions_by_split.values() for name in names}
    return {
        "splits": [
            (title, _question_rows(greedy, names, colour)) for title, names in questions_by_split.items() if names
        ],
        "changed": _question_rows(
            greedy,
            _distinct_entities(greedy, [name for name in changed if name not in shown_ids], MAX_CHANGED_QUESTIONS),
            colour,
        ),
        "changed_count": len(changed),
        "question_count": len(shared_ids),
        "sampled": _question_rows(
            sampled, _distinct_entities(sampled, _shared_ids(sampled), MAX_SAMPLED_REPLIES), colour
        ),
        "masked": _question_rows(masked, _shared_ids(masked)[:MAX_MASKED_STATEMENTS], colour),
        "rewards": [
            {"model": model["model"], "against": model["against"], "svg": svg}
            for model in run.scorecard.get("models", [])
            if makers[str(model["model"])].startswith("align@")
            and (svg := _reward_histograms(sampled, [str(model.get("against")), str(model["model"])]))
        ],
        "page": SAMPLES_PATH.as_posix() if (run.project / SAMPLES_PATH).is_file() else "",
    }


def _evaluated_models(run: Results) -> list[str]:
    """Return the evaluated models, in graph order."""
    listed = [str(model["model"]) for model in run.scorecard.get("models", [])]
    return listed or [name.partition("@")[2] for name in run.steps if name.startswith("evaluate@")]


def _read_answers(run: Results, model: str) -> list[Part]:
    from tasks.common import tables

    try:
        rows: list[Part] = tables.read(run.project / "data" / "evaluate" / model / "answers").to_pylist()
    except FileNotFoundError:
        return []
    return rows


def _of_kind(rows: Sequence[Part], kind: str) -> dict[str, Part]:
    return {row["id"]: row for row in rows if row["kind"] == kind}


def _first_model(answers_by_model: dict[str, dict[str, Part]]) -> dict[str, Part]:
    return next(iter(answers_by_model.values()), {})


def _shared_ids(answers_by_model: dict[str, dict[str, Part]]) -> list[str]:
    """Return the ids of the questions that every model has answered, sorted."""
    return sorted(
        name for name in _first_model(answers_by_model) if all(name in rows for rows in answers_by_model.values())
    )


def _distinct_entities(
    answers_by_model: dict[str, dict[str, Part]], ids: Sequence[str], count: int = MAX_QUESTIONS
) -> list[str]:
    """Return the first `count` ids about distinct entities."""
    by_entity: dict[str, str] = {}
    for name in ids:
        by_entity.setdefault(str(_first_model(answers_by_model)[name]["entity"]), name)
    return list(by_entity.values())[:count]


def _verdict_changed(answers_by_model: dict[str, dict[str, Part]], name: str, models: Sequence[str]) -> bool:
    """Whether these models' answers to a question have different verdicts."""
    verdicts = [rows[name]["correct"] for model, rows in answers_by_model.items() if model in models]
    return len(set(verdicts)) > 1


def _question_rows(
    answers_by_model: dict[str, dict[str, Part]], ids: Sequence[str], colour: dict[str, str]
) -> list[Part]:
    first = _first_model(answers_by_model)
    return [
        {
            "question": first[name]["question"],
            "reference": first[name]["reference"],
            "replies": [
                {
                    "model": model,
                    "colour": colour.get(model, COLOURS[0]),
                    "text": shorten(str(rows[name]["reply"])),
                    "correct": rows[name]["correct"],
                    "reward": rows[name]["reward"],
                }
                for model, rows in answers_by_model.items()
            ],
        }
        for name in ids
    ]


def _reward_histograms(sampled: dict[str, dict[str, Part]], names: Sequence[str]) -> Markup:
    """Return the histograms of the replies' rewards before and after an alignment."""
    groups = [
        (name, colour, [float(row["reward"]) for row in sampled[name].values() if row["reward"] is not None])
        for name, colour in zip(names, ("m2", "m3"), strict=True)
        if name in sampled
    ]
    groups = [group for group in groups if group[2]]
    return plots.histograms(groups, "reward of a reply, rating points", "share of replies")


def shorten(text: str) -> str:
    """Return text without control characters, truncated to MAX_REPLY_CHARACTERS."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    return clean if len(clean) <= MAX_REPLY_CHARACTERS else f"{clean[: MAX_REPLY_CHARACTERS - 1]}…"
