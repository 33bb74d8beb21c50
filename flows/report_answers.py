"""The run report's answers: what every model replied to the same questions, from `data/evaluate/*/answers`.

Questions are drawn by the hashes that are their ids, so that nobody has chosen them and a page written twice shows the
same ones.
"""

from collections.abc import Sequence

from markupsafe import Markup

from flows import report_plots
from flows.records import SAMPLES
from flows.report_parts import Part
from flows.report_sheet import COLOURS
from flows.results import Results

SIDES = (("Questions of the kind it was tuned on", "train"), ("About entities held out of the questions", "heldout"))
QUESTIONS, TURNED, REPLIES, MASKED, LONGEST = 6, 6, 6, 10, 280


def answers(run: Results) -> Part:
    """Return greedy answers, those whose verdict a step changed, sampled replies with rewards, and masked names."""
    sheets = {name: rows for name in _evaluated(run) if (rows := _answers(run, name))}
    greedy = {name: _of_kind(rows, "greedy") for name, rows in sheets.items()}
    greedy = {name: rows for name, rows in greedy.items() if rows}
    masked = {name: found for name, rows in sheets.items() if (found := _of_kind(rows, "masked"))}
    sampled = {
        name: found for name, rows in sheets.items() if name != "pruned" and (found := _of_kind(rows, "sampled"))
    }
    if not sheets:
        return {}
    shared = _shared(greedy)
    turned = [name for name in shared if _turned(greedy, name)]
    drawn = {
        title: _different(greedy, [name for name in shared if _first(greedy)[name]["split"] == split])
        for title, split in SIDES
    }
    seen = {name for names in drawn.values() for name in names}
    return {
        "sides": [(title, _asked(greedy, names)) for title, names in drawn.items() if names],
        "turned": _asked(greedy, _different(greedy, [name for name in turned if name not in seen], TURNED)),
        "turned_count": len(turned),
        "asked_count": len(shared),
        "sampled": _asked(sampled, _different(sampled, _shared(sampled), REPLIES)),
        "masked": _asked(masked, _well_known_first(masked)[:MASKED]),
        "rewards": _rewards(sampled),
        "page": SAMPLES.as_posix() if (run.project / SAMPLES).is_file() else "",
    }


def _evaluated(run: Results) -> list[str]:
    """Return the models that may have answered, in chain order."""
    listed = [str(model["model"]) for model in run.sheet.get("models", [])]
    return listed or [name.partition("@")[2] for name in run.steps if name.startswith("evaluate@")]


def _answers(run: Results, model: str) -> list[Part]:
    from tasks.common import tables

    try:
        rows: list[Part] = tables.read(run.project / "data" / "evaluate" / model / "answers").to_pylist()
    except FileNotFoundError:
        return []
    return rows


def _of_kind(rows: Sequence[Part], kind: str) -> dict[str, Part]:
    return {row["id"]: row for row in rows if row["kind"] == kind}


def _first(sheets: dict[str, dict[str, Part]]) -> dict[str, Part]:
    return next(iter(sheets.values()), {})


def _shared(sheets: dict[str, dict[str, Part]]) -> list[str]:
    """Return the ids that every model has answered, in the order of these hashes."""
    return sorted(name for name in _first(sheets) if all(name in rows for rows in sheets.values()))


def _different(sheets: dict[str, dict[str, Part]], ids: Sequence[str], count: int = QUESTIONS) -> list[str]:
    """Return the first few ids that ask about different entities."""
    by_entity: dict[str, str] = {}
    for name in ids:
        by_entity.setdefault(str(_first(sheets)[name]["entity"]), name)
    return list(by_entity.values())[:count]


def _turned(sheets: dict[str, dict[str, Part]], name: str) -> bool:
    """Whether a step after fine-tuning turned a right answer wrong or a wrong one right."""
    verdicts = [rows[name]["correct"] for model, rows in sheets.items() if model != "base"]
    return len(set(verdicts)) > 1


def _asked(sheets: dict[str, dict[str, Part]], ids: Sequence[str]) -> list[Part]:
    first = _first(sheets)
    return [
        {
            "question": first[name]["question"],
            "wanted": first[name]["wanted"],
            "replies": [
                {
                    "model": model,
                    "colour": COLOURS.get(model, "m1"),
                    "text": shorten(str(rows[name]["reply"])),
                    "correct": rows[name]["correct"],
                    "reward": rows[name]["reward"],
                }
                for model, rows in sheets.items()
            ],
        }
        for name in ids
    ]


def _well_known_first(sheets: dict[str, dict[str, Part]]) -> list[str]:
    """Return the masked statements, the one that everybody knows first."""
    return sorted(_shared(sheets), key=lambda name: ("is Paris." not in _first(sheets)[name]["question"], name))


def _rewards(sampled: dict[str, dict[str, Part]]) -> Markup:
    groups = [
        (name, COLOURS[name], [float(row["reward"]) for row in sampled[name].values() if row["reward"] is not None])
        for name in ("tuned", "policy")
        if name in sampled
    ]
    return report_plots.histograms(groups, "reward of a reply, rating points", "share of replies")


def shorten(text: str) -> str:
    """Return text at most so long as a table can show, without control characters."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    return clean if len(clean) <= LONGEST else f"{clean[: LONGEST - 1]}…"
