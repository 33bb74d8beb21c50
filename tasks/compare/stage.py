"""Join the evaluations of all models into one scorecard and check the gates.

Run as `python -m tasks.compare`. It writes `metrics/evaluate.json` and the models' replies side by side in
`data/compare/samples.html`. Models are listed in graph order, each compared with its nearest evaluated ancestor. The
stage succeeds even if a gate fails, so that the figures are available; `package` fails then. Intervals are over
entities, because answers about one entity are correlated: Wilson intervals on the effective sample size for rates,
bootstrap intervals (Efron & Tibshirani 1993) for paired differences.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from tasks.common import tables
from tasks.common.evaluation.scorecard import METRICS
from tasks.common.harness import records
from tasks.common.harness.job import Job, Link
from tasks.common.harness.lineage import ancestry, entries_by_folder
from tasks.common.settings import Settings
from tasks.compare import bootstrap, continuations, gates, samples, wilson
from tasks.compare.gates import Gate

NUMERICS = False  # no model computes here
GRAPH = True
INPUTS: dict[str, str] = {}
OUTPUTS = {"differences": "data/compare/differences.json", "samples": "data/compare/samples.html"}

RATES = {
    "exact_match_seen": ("greedy", "train"),
    "exact_match_heldout": ("greedy", "heldout"),
    "masked_names": ("masked", "train"),
}

Row = dict[str, Any]


class Config(Settings):
    """Settings of the comparison."""

    resamples: int = Field(default=2000, description="Bootstrap resamples", ge=100)
    gates: list[Gate] = Field(default=[], description="Bounds that the models must meet for `package` to succeed")


def graph_inputs(config: Config, links: Sequence[Link]) -> dict[str, str]:
    """Return the answers and records of all evaluations, and the records of the stages that gates name."""
    found = {f"answers of {link.key}": f"data/evaluate/{link.key}/answers" for link in evaluations(links)}
    found |= {f"record of evaluate@{link.key}": f"data/evaluate/{link.key}/record.json" for link in evaluations(links)}
    named = {name for gate in config.gates for name in (gate.model, gate.against)}
    found |= {
        f"record of {link.name}": f"data/{link.stage}/{link.key}/record.json" for link in links if link.name in named
    }
    return found


def evaluations(links: Sequence[Link]) -> list[Link]:
    """Return the evaluations in graph order of their models; models from user folders come first."""
    position = {link.folder: number for number, link in enumerate(links)}
    return sorted(
        (link for link in links if link.stage == "evaluate"), key=lambda link: position.get(link.reads[0], -1)
    )


def run(config: Config, job: Job) -> dict[str, Any]:
    """Return the scorecard and the checked gates: the contents of `metrics/evaluate.json`."""
    evaluated = evaluations(job.graph)
    found = {
        name.removeprefix("record of "): json.loads(path.read_text(encoding="utf-8"))["metrics"]
        for name, path in job.inputs.items()
        if name.startswith("record of ")
    }
    answers = {link.key: tables.read(job.inputs[f"answers of {link.key}"]).to_pylist() for link in evaluated}
    rows = [_row(link, job, found[link.name], answers, config) for link in evaluated]
    changes = [change for row in rows for change in _changes(row, answers, config, job)]
    records.write_json(job.outputs["differences"], changes)
    measured = next((found[link.name]["toxicity"] for link in evaluated if found[link.name].get("toxicity")), None)
    toxicity = _toxicity(measured, rows, answers, config, job)
    page = samples.page([row for row in rows if row["kind"] == "causal"], answers, toxicity)
    job.outputs["samples"].write_bytes(page.encode("utf-8", "replace"))  # a reply may contain a lone surrogate
    figures = found | {row["model"]: row for row in rows}
    return {"models": rows, "gates": [gates.check(gate, figures) for gate in config.gates], "toxicity": toxicity}


def _row(link: Link, job: Job, figures: Mapping[str, Any], answers: Mapping[str, Sequence[Row]], config: Config) -> Row:
    """Return a model's scorecard row: its origin and every figure, None where it does not apply."""
    producer = entries_by_folder(job.graph).get(link.reads[0])
    row: Row = {
        "model": link.key, "made_by": producer.name if producer else "", "kind": figures.get("kind"),
        "before": evaluated_ancestor(link, job.graph), "against": None, **{name: figures.get(name) for name in METRICS},
    }  # fmt: skip
    for rate, (kind, split) in RATES.items():
        if row[rate] is not None:
            row[f"{rate}_interval"] = interval(_correct_by_entity(answers[link.key], kind, split))
    row |= continuations.figures(answers[link.key], config.resamples, job.seed)
    if other := model_before_alignment(link, job.graph):
        row |= {"against": other, **win_rate(answers[other], answers[link.key])}
    return row


def evaluated_ancestor(link: Link, links: Sequence[Link]) -> str | None:
    """Return the evaluation of the model's nearest evaluated ancestor, or None."""
    known = _by_folder(links)
    return next((known[folder] for folder in ancestry(links, link.reads[0])[1:] if folder in known), None)


def model_before_alignment(link: Link, links: Sequence[Link]) -> str | None:
    """Return the evaluation of the nearest chat model before the first alignment; None for an unaligned model."""
    known, by_folder = _by_folder(links), entries_by_folder(links)
    folders = ancestry(links, link.reads[0])
    stages = [by_folder[folder].stage if folder in by_folder else "" for folder in folders]
    if "align" not in stages:
        return None
    first = len(stages) - stages[::-1].index("align")
    chats = zip(folders[first:], stages[first:], strict=True)
    return next((known[folder] for folder, stage in chats if folder in known and stage != "pretrain"), None)


def _by_folder(links: Sequence[Link]) -> dict[str, str]:
    """Return the evaluation of each evaluated folder, the first one if there are several."""
    found: dict[str, str] = {}
    for link in evaluations(links):
        found.setdefault(link.reads[0], link.key)
    return found


def _changes(row: Row, answers: Mapping[str, Sequence[Row]], config: Config, job: Job) -> list[Row]:
    """Return the changes of a model's figures from its nearest evaluated ancestor, paired by question or prompt."""
    old, new = row["before"], row["model"]
    if old is None:
        return []
    found = {
        rate: paired_difference(answers[old], answers[new], kind_and_split, config.resamples, job.seed)
        for rate, kind_and_split in RATES.items()
    } | continuations.changes(answers[old], answers[new], config.resamples, job.seed)
    return [{"from": old, "to": new, "rate": rate, **change} for rate, change in found.items() if change]


def _toxicity(
    measured: Row | None, rows: Sequence[Row], answers: Mapping[str, list[Row]], config: Config, job: Job
) -> Row | None:
    """Return the classifier's figures and the toxicity of every category; None if no evaluation measured it."""
    if not measured:
        return None
    header = {name: measured[name] for name in ("classifier", "ask", "continuations")}
    aligned = {row["model"]: row["against"] for row in rows if row["against"] and row["made_by"].startswith("align@")}
    return {**header, "categories": continuations.by_category(answers, aligned, config.resamples, job.seed)}


def _correct_by_entity(rows: Sequence[dict[str, Any]], kind: str, split: str) -> dict[str, list[tuple[str, bool]]]:
    by_entity: dict[str, list[tuple[str, bool]]] = {}
    for row in rows:
        if row["kind"] == kind and row["split"] == split:
            by_entity.setdefault(row["entity"], []).append((row["id"], bool(row["correct"])))
    return by_entity


def interval(by_entity: dict[str, list[tuple[str, bool]]]) -> list[float]:
    """Return the 95 % Wilson interval of a rate, clustered by entity."""
    sums = np.array(
        [[sum(right for _, right in rows), len(rows)] for _, rows in sorted(by_entity.items())], dtype=float
    )
    return wilson.interval(sums)


def paired_difference(
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    kind_and_split: tuple[str, str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the difference of a rate between two models on the same questions, with its paired 95 % interval.

    Empty if they share no question.
    """
    first, second = (_correct_by_entity(rows, *kind_and_split) for rows in (before, after))
    changes = []
    for entity, rows in sorted(first.items()):
        others = dict(second.get(entity, []))
        differences = [others[name] - right for name, right in rows if name in others]
        changes.append([sum(differences), len(differences)])
    sums = np.array(changes, dtype=float).reshape(-1, 2)
    if not sums[:, 1].sum():
        return {}
    return {
        "change": round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4),
        "interval": bootstrap.interval(sums, resamples, seed),
    }


def win_rate(before: Sequence[Row], after: Sequence[Row]) -> Row:
    """Return how often the judge prefers a model's reply to that of the model before alignment, with its interval.

    It compares sampled replies to the same prompts about held-out entities, which alignment has not seen either. A tie
    counts half. The interval is clustered by entity. Both values are None if there are no such replies.
    """
    old, new = _judged_replies(before), _judged_replies(after)
    by_entity: dict[str, list[float]] = {}
    for key in old.keys() & new.keys():
        score, score_before = new[key]["judge_score"], old[key]["judge_score"]
        by_entity.setdefault(old[key]["entity"], []).append((score > score_before) + 0.5 * (score == score_before))
    if not by_entity:
        return {"win_rate": None, "win_rate_interval": None}
    sums = np.array([[sum(wins), len(wins)] for _, wins in sorted(by_entity.items())], dtype=float)
    return {
        "win_rate": round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4),
        "win_rate_interval": wilson.interval(sums),
    }


def _judged_replies(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """Return the judged replies about held-out entities by (question id, index of the reply to it)."""
    found: dict[tuple[str, int], Row] = {}
    counts: dict[str, int] = {}
    for row in rows:
        if row["kind"] == "sampled" and row["split"] == "heldout" and row["judge_score"] is not None:
            number = counts[row["id"]] = counts.get(row["id"], -1) + 1
            found[row["id"], number] = row
    return found
