"""Join the sheets of all models into one table that shows what each step gained and cost, and judge the gates.

Run as `python -m tasks.compare`; leaves `metrics/evaluate.json` and, for people, the models' replies side by side in
`data/compare/samples.html`. It ends well even where a gate fails, so that the figures can be read; `package` is what
refuses. Intervals are over entities, because questions about one entity are right or wrong together: of rates Wilson's
on the effective number of cases, of differences, which are paired, bootstrap intervals (Efron & Tibshirani 1993).
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from tasks.common import stage, tables
from tasks.common.evaluation import agreement, bootstrap, continuations, samples, wilson
from tasks.common.settings import Settings
from tasks.common.stage import Job

DECODERS = ("base", "tuned", "policy", "pruned", "int8")
CHAIN = ("encoder", "encoder-int8", *DECODERS)
NUMERICS = False  # no model computes here
INPUTS = (
    {f"sheet of {key}": f"metrics/evaluate@{key}.json" for key in CHAIN}
    | {f"answers of {key}": f"data/evaluate/{key}/answers" for key in CHAIN}
    | {
        "reward": "metrics/reward@policy.json",
        "prune": "metrics/prune.json",
        "quantize": "metrics/quantize@policy.json",
    }
)
OUTPUTS = {"differences": "data/compare/differences.json", "samples": "data/compare/samples.html"}

COLUMNS = (
    "model", "parameters", "bytes", "exact_match_tuned", "exact_match_tuned_interval", "exact_match_heldout",
    "exact_match_heldout_interval", "perplexity", "bits_per_byte", "reward_mean", "reward_std", "win_rate_over_tuned",
    "win_rate_over_tuned_interval", "distinct_2", "toxicity_mean", "toxicity_mean_interval", "toxic_share",
    "toxic_share_interval", "masked_names", "masked_names_interval",
)  # fmt: skip
RATES = {
    "exact_match_tuned": ("greedy", "train"),
    "exact_match_heldout": ("greedy", "heldout"),
    "masked_names": ("masked", "train"),
}
JUDGED = ("policy", "pruned", "int8")  # whose replies the judge compares with the tuned model's
STEPS = (("base", "tuned"), ("tuned", "policy"), ("policy", "pruned"), ("pruned", "int8"), ("encoder", "encoder-int8"))


class Gates(Settings):
    """Thresholds that the models must keep for `package` to go on. Rates are shares between 0 and 1."""

    masked_names_min: float = Field(description="Masked names that the encoder puts first", ge=0, le=1)
    tuned_exact_match_min: float = Field(description="Exact match of the tuned model on tuned questions", ge=0, le=1)
    heldout_exact_match_min: float = Field(
        description="Exact match of the tuned model on held-out entities", ge=0, le=1
    )
    reward_accuracy_min: float = Field(
        description="Held-out pairs in people's order: those a rating point apart, or what else there is", ge=0, le=1
    )
    ppo_reward_gain_min: float = Field(description="Mean reward gained by PPO, in rating points", ge=-8, le=8)
    ppo_exact_match_drop_max: float = Field(
        description="Exact match lost by PPO, on either side of the sheet", ge=0, le=1
    )
    ppo_distinct_2_kept_min: float = Field(description="Diversity kept by PPO, as a share of the tuned model's", ge=0)
    prune_removed_min: float = Field(description="Parameters removed by pruning, as a share of all", ge=0, lt=1)
    prune_exact_match_drop_max: float = Field(description="Exact match lost by pruning, on either side", ge=0, le=1)
    int8_exact_match_drop_max: float = Field(description="Exact match lost by INT8, on either side", ge=0, le=1)
    int8_size_ratio_max: float = Field(description="INT8 file as a share of the FP32 file", gt=0, le=1)


class Config(Settings):
    """Settings of the comparison."""

    resamples: int = Field(description="Bootstrap resamples", ge=100)
    gates: Gates


def run(config: Config, job: Job) -> dict[str, Any]:
    """Return the table and the verdicts of the gates: the contents of `metrics/evaluate.json`."""
    sheets = {key: json.loads(job.inputs[f"sheet of {key}"].read_text(encoding="utf-8")) for key in CHAIN}
    answers = {key: tables.read(job.inputs[f"answers of {key}"]).to_pylist() for key in CHAIN}
    rows = []
    for key in CHAIN:
        row = {column: sheets[key].get(column) for column in COLUMNS}
        for rate, (kind, split) in RATES.items():
            if row[rate] is not None:
                row[f"{rate}_interval"] = interval(_correct(answers[key], kind, split))
        row |= continuations.figures(answers[key], config.resamples, job.seed)
        if key in JUDGED:
            row |= win_rate(answers["tuned"], answers[key])
        rows.append(row)
    changes = [
        {"from": old, "to": new, "rate": rate, **paired(answers[old], answers[new], side, config.resamples, job.seed)}
        for old, new in STEPS
        for rate, side in RATES.items()
        if sheets[old].get(rate) is not None and sheets[new].get(rate) is not None
    ]
    changes += [
        {"from": old, "to": new, "rate": rate, **change}
        for old, new in STEPS
        for rate, change in continuations.changes(answers[old], answers[new], config.resamples, job.seed).items()
    ]
    stage.write_json(job.outputs["differences"], changes)
    toxicity = _toxicity(sheets["tuned"].get("toxicity"), {key: answers[key] for key in DECODERS}, config, job)
    page = samples.page([row for row in rows if row["model"] in DECODERS], answers, JUDGED, toxicity)
    job.outputs["samples"].write_bytes(page.encode("utf-8", "replace"))  # a reply may hold half a character
    others = {
        name: json.loads(job.inputs[name].read_text(encoding="utf-8")) for name in ("reward", "prune", "quantize")
    }
    return {"models": rows, "gates": judge(sheets, others, config.gates), "toxicity": toxicity}


def _toxicity(
    measured: dict[str, Any] | None, answers: dict[str, list[dict[str, Any]]], config: Config, job: Job
) -> dict[str, Any] | None:
    """Return how continuations were judged, and every category's figures; None where none were asked for."""
    if not measured:
        return None
    told = {name: measured[name] for name in ("classifier", "ask", "continuations")}
    return {**told, "categories": continuations.by_category(answers, config.resamples, job.seed)}


def judge(sheets: dict[str, Any], others: dict[str, Any], gates: Gates) -> list[dict[str, Any]]:
    """Return every gate with its value, limit and verdict; a value that could not be had fails."""
    tuned, policy = sheets["tuned"], sheets["policy"]
    values = {
        "masked_names_min": sheets["encoder"]["masked_names"],
        "tuned_exact_match_min": tuned["exact_match_tuned"],
        "heldout_exact_match_min": tuned["exact_match_heldout"],
        "reward_accuracy_min": agreement.headline(others["reward"]).get("model"),
        "ppo_reward_gain_min": policy["reward_mean"] - tuned["reward_mean"],
        "ppo_exact_match_drop_max": drop(tuned, policy),
        "ppo_distinct_2_kept_min": policy["distinct_2"] / tuned["distinct_2"] if tuned["distinct_2"] else None,
        "prune_removed_min": others["prune"]["removed"],
        "prune_exact_match_drop_max": drop(policy, sheets["pruned"]),
        "int8_exact_match_drop_max": drop(sheets["pruned"], sheets["int8"]),
        "int8_size_ratio_max": others["quantize"]["ratio"],
    }
    verdicts = []
    for name, limit in gates.model_dump().items():
        value = None if values[name] is None else round(values[name], 4)  # 0.97 - 0.94 is not above 0.03
        passed = value is not None and (value >= limit if name.endswith("_min") else value <= limit)
        verdicts.append({"name": name, "value": value, "limit": limit, "passed": passed})
    return verdicts


def drop(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Return the larger loss of exact match on the two sides of the sheet (negative where both rose)."""
    sides = [(before[rate], after[rate]) for rate in ("exact_match_tuned", "exact_match_heldout")]
    return max((a - b for a, b in sides if a is not None and b is not None), default=None)


def _correct(rows: Sequence[dict[str, Any]], kind: str, split: str) -> dict[str, list[tuple[str, bool]]]:
    by_entity: dict[str, list[tuple[str, bool]]] = {}
    for row in rows:
        if row["kind"] == kind and row["split"] == split:
            by_entity.setdefault(row["entity"], []).append((row["id"], bool(row["correct"])))
    return by_entity


def interval(by_entity: dict[str, list[tuple[str, bool]]]) -> list[float]:
    """Return the 95 % interval of a rate, over entities."""
    sums = np.array(
        [[sum(right for _, right in rows), len(rows)] for _, rows in sorted(by_entity.items())], dtype=float
    )
    return wilson.interval(sums)


def paired(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], side: tuple[str, str], resamples: int, seed: int
) -> dict[str, Any]:
    """Return the difference of a rate between two models on the same questions, with its paired 95 % interval."""
    first, second = (_correct(rows, *side) for rows in (before, after))
    changes = []
    for entity, rows in sorted(first.items()):
        others = dict(second.get(entity, []))
        same = [others[name] - right for name, right in rows if name in others]
        changes.append([sum(same), len(same)])
    sums = np.array(changes, dtype=float)
    return {
        "change": round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4),
        "interval": bootstrap.interval(sums, resamples, seed),
    }


def win_rate(tuned: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how often the judge prefers a model's reply to the tuned model's, and the 95 % interval over entities.

    Compared are sampled replies to the same prompt, about entities held out of the questions, which PPO has not seen
    either; a tie counts half. Both are None where there are none.
    """
    before, after = ([row for row in rows if _is_judged(row)] for rows in (tuned, other))
    by_entity: dict[str, list[float]] = {}
    for old, new in zip(before, after, strict=True):
        won = (new["judged"] > old["judged"]) + 0.5 * (new["judged"] == old["judged"])
        by_entity.setdefault(old["entity"], []).append(won)
    if not by_entity:
        return {"win_rate_over_tuned": None, "win_rate_over_tuned_interval": None}
    sums = np.array([[sum(wins), len(wins)] for _, wins in sorted(by_entity.items())], dtype=float)
    return {
        "win_rate_over_tuned": round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4),
        "win_rate_over_tuned_interval": wilson.interval(sums),
    }


def _is_judged(row: dict[str, Any]) -> bool:
    return row["kind"] == "sampled" and row["split"] == "heldout" and row["judged"] is not None


if __name__ == "__main__":
    stage.main("tasks.compare")
