"""Toxicity of the models' continuations, over all prompts and by category, and the changes between models.

Intervals are over prompts, because continuations of one prompt are correlated. The interval of a share is Wilson's;
those of means and changes are bootstrap intervals. Changes are paired by prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tasks.common.evaluation.scorecard import TOXICITY_THRESHOLD
from tasks.compare import bootstrap, wilson

FIGURES = ("toxicity_mean", "toxic_share")
Row = Mapping[str, Any]


def figures(rows: Sequence[Row], resamples: int, seed: int) -> dict[str, Any]:
    """Return a model's mean toxicity and share of toxic continuations with intervals; empty without continuations."""
    prompts = _sums_by_prompt(rows)
    if not prompts:
        return {}
    sums = np.array([prompts[name] for name in sorted(prompts)])
    scores, toxic, count = sums.sum(axis=0).tolist()
    return {
        "toxicity_mean": round(scores / count, 4),
        "toxicity_mean_interval": bootstrap.interval(sums[:, [0, 2]], resamples, seed),
        "toxic_share": round(toxic / count, 4),
        "toxic_share_interval": wilson.interval(sums[:, [1, 2]]),
    }


def changes(before: Sequence[Row], after: Sequence[Row], resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return the changes of both figures between two models with paired intervals; empty without shared prompts."""
    first, second = _sums_by_prompt(before), _sums_by_prompt(after)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return {}
    old, new = (np.array([sums[name] for name in shared]) for sums in (first, second))
    count = old[:, 2]
    found = {}
    for column, figure in enumerate(FIGURES):
        sums = np.stack([new[:, column] / new[:, 2] * count - old[:, column], count], axis=1)
        total = float(sums[:, 0].sum() / sums[:, 1].sum())
        found[figure] = {"change": round(total, 4), "interval": bootstrap.interval(sums, resamples, seed)}
    return found


def by_category(
    answers: Mapping[str, Sequence[Row]], aligned: Mapping[str, str], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Return each category's figures by model and the changes due to alignment; the first row (None) is all prompts.

    `aligned` maps each aligned model to the model before alignment.
    """
    chosen = {model: [row for row in rows if row["kind"] == "continuation"] for model, rows in answers.items()}
    categories = sorted({row["entity"] for rows in chosen.values() for row in rows})
    table = []
    for category in [None, *categories] if categories else []:
        parts = {
            model: [row for row in rows if category in (None, row["entity"])] for model, rows in chosen.items() if rows
        }
        table.append({
            "category": category,
            "prompts": len({row["id"] for rows in parts.values() for row in rows}),
            "models": {model: figures(rows, resamples, seed) for model, rows in parts.items()},
            "changes": {
                model: {"against": before, **changes(parts.get(before, ()), parts.get(model, ()), resamples, seed)}
                for model, before in aligned.items()
            },
        })  # fmt: skip
    return table


def most_toxic(answers: Mapping[str, Sequence[Row]], count: int) -> list[dict[str, Any]]:
    """Return, by category, the `count` prompts with the most toxic continuations, and each model's worst one."""
    by_prompt: dict[tuple[str, str], dict[str, Row]] = {}
    for model, rows in answers.items():
        for row in rows:
            if row["kind"] == "continuation":
                worst = by_prompt.setdefault((row["entity"], row["id"]), {})
                if model not in worst or row["toxicity"] > worst[model]["toxicity"]:
                    worst[model] = row
    found: dict[str, list[dict[str, Row]]] = {}
    for (category, _), worst in sorted(
        by_prompt.items(), key=lambda item: (item[0][0], -_max_toxicity(item[1]), item[0][1])
    ):
        found.setdefault(category, []).append(worst)
    return [
        {"category": category, "prompt": next(iter(worst.values()))["question"], "models": worst}
        for category, prompts in found.items()
        for worst in prompts[:count]
    ]


def _max_toxicity(worst: Mapping[str, Row]) -> float:
    return max(float(row["toxicity"]) for row in worst.values())


def _sums_by_prompt(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Return for each prompt the sum of its toxicity scores, the number of toxic continuations and of all."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "continuation":
            sums = found.setdefault(row["id"], [0.0, 0.0, 0.0])
            for column, value in enumerate((row["toxicity"], row["toxicity"] > TOXICITY_THRESHOLD, 1)):
                sums[column] += value
    return found
