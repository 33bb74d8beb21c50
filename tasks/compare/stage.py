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

from pydantic import Field

from tasks.common import tables
from tasks.common.evaluation.results import ResultStore
from tasks.common.harness import records
from tasks.common.harness.job import Job, Link
from tasks.common.harness.lineage import entries_by_folder, evaluated_ancestor, evaluations, model_before_alignment
from tasks.common.settings import Settings
from tasks.compare import continuations, gates, implicit_rewards, means, preferences, samples
from tasks.compare.gates import Gate
from tasks.compare.language_judge import judge_pairs

NUMERICS = False  # no model computes here
GRAPH = True
INPUTS: dict[str, str] = {}
OUTPUTS = {
    "differences": "data/compare/differences.json",
    "judgements": "data/compare/judgements.json",
    "samples": "data/compare/samples.html",
}

SECTIONS = ("evaluations",)
NOT_FIGURES = ("model", "kind", "evaluations")  # in the metrics of an evaluation

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


def run(config: Config, job: Job) -> dict[str, Any]:
    """Return the scorecard and the checked gates: the contents of `metrics/evaluate.json`."""
    evaluated = evaluations(job.graph)
    found = {
        name.removeprefix("record of "): json.loads(path.read_text(encoding="utf-8"))["metrics"]
        for name, path in job.inputs.items()
        if name.startswith("record of ")
    }
    answers = {link.key: tables.read(job.inputs[f"answers of {link.key}"]).to_pylist() for link in evaluated}
    described = {link.key: found[link.name]["evaluations"] for link in evaluated}
    rows = [_row(link, job, found[link.name], answers, config) for link in evaluated]
    store = ResultStore.for_job(job, parts=())  # a verdict depends only on what the judge is asked
    judgements = [
        _judge(link, row, job, described[link.key], answers, store) for link, row in zip(evaluated, rows, strict=True)
    ]
    records.write_json(job.outputs["judgements"], [one for judged in judgements for one in judged])
    for link, row in zip(evaluated, rows, strict=True):
        _add_implicit_rewards(row, link.key, job, described[link.key], answers)
    for name in dict.fromkeys(
        name for row in rows for name, value in row.items() if not isinstance(value, dict | list)
    ):
        for row in rows:
            row.setdefault(name, None)
    changes = [change for row in rows for change in _changes(row, described, answers, config, job)]
    records.write_json(job.outputs["differences"], changes)
    toxicity = _toxicity(described, rows, answers, config, job)
    page = samples.page([row for row in rows if row["kind"] == "causal"], answers, toxicity)
    job.outputs["samples"].write_bytes(page.encode("utf-8", "replace"))  # a reply may contain a lone surrogate
    figures = found | {row["model"]: row for row in rows}
    checked = [gates.check(gate, figures, described) for gate in config.gates]
    return {"models": rows, "gates": checked, "evaluations": _evaluations(described), "toxicity": toxicity}


def _evaluations(described: Mapping[str, Mapping[str, Row]]) -> Row:
    """Return what is said of each evaluation, and of the models that it gave no figures for the reason."""
    found: Row = {}
    for model, evaluations_of_model in described.items():
        for name, one in evaluations_of_model.items():
            kept = {key: value for key, value in one.items() if key in ("kind", "applies_to", "versions")}
            entry = found.setdefault(name, {**kept, "absent": {}})
            entry.update(kept)
            if one.get("absent"):
                entry["absent"][model] = one["absent"]
    return found


def _row(link: Link, job: Job, metrics: Mapping[str, Any], answers: Mapping[str, Sequence[Row]], config: Config) -> Row:
    """Return a model's scorecard row: its origin, every figure and the intervals."""
    producer = entries_by_folder(job.graph).get(link.reads[0])
    row: Row = {
        "model": link.key, "made_by": producer.name if producer else "", "kind": metrics.get("kind"),
        "before": evaluated_ancestor(link, job.graph), "against": None,
        **{name: value for name, value in metrics.items() if name not in NOT_FIGURES},
    }  # fmt: skip
    for name, one in metrics["evaluations"].items():
        own = row if name == one["kind"] else row[name]
        for figure, spec in one["means"].items():
            chosen = means.select(answers[link.key], spec, name)
            if found := means.interval(chosen, spec, config.resamples, job.seed):
                own[f"{figure}_interval"] = found
            if parts := means.by_seen_text(chosen, spec):
                row.setdefault("by_seen_text", {})[figure if own is row else f"{name}.{figure}"] = parts
    row |= continuations.figures(answers[link.key], config.resamples, job.seed)
    return row


def _judge(
    link: Link, row: Row, job: Job, described: Mapping[str, Row], answers: Mapping[str, Sequence[Row]],
    store: ResultStore,
) -> list[Row]:  # fmt: skip
    """Add the win rates of a model to its row; return the verdicts of language models."""
    judgements = []
    row["against"] = before = model_before_alignment(link, job.graph)
    for name, one in job.sections["evaluations"].items():
        other = getattr(one, "against", None) or before
        if name not in described or described[name]["kind"] != "judge" or other in (None, link.key):
            continue
        pairs = preferences.pair_replies(answers[other], answers[link.key], one.pairs)
        if one.by is None:
            results = preferences.by_score(pairs)
        else:
            found = judge_pairs(one.by, pairs, store)
            results = [judged["result"] for judged in found]
            about = {"evaluation": name, "model": link.key, "against": other}
            judgements += [
                {**about, "id": pair.id, "number": pair.number, **judged}
                for pair, judged in zip(pairs, found, strict=True)
            ]
        figures = preferences.win_rate(pairs, results)
        _add_figures(row, name, described, figures, other)
        if figures["win_rate"] is None:
            described[name].setdefault("absent", f"{link.key} and {other} have no judged replies to held-out prompts")
    return judgements


def _add_implicit_rewards(
    row: Row, model: str, job: Job, described: Mapping[str, Row], answers: Mapping[str, Sequence[Row]]
) -> None:
    """Add the accuracies of a model's implicit reward to its row."""
    for name, one in job.sections["evaluations"].items():
        other = getattr(one, "against", None) or row["against"]
        if name in described and described[name]["kind"] == "preferences" and other not in (None, model):
            figures = implicit_rewards.accuracy(answers[other], answers[model], name)
            _add_figures(row, name, described, figures, other)
            if figures[implicit_rewards.FIGURE] is None:
                described[name].setdefault("absent", f"{model} and {other} have no scored pair in common")


def _add_figures(row: Row, name: str, described: Mapping[str, Row], figures: Row, against: str) -> None:
    """Add figures of a comparison with another model to a row: those of a named evaluation under its name."""
    if name == described[name]["kind"]:
        row.update(figures)
    else:
        row[name] = {**row[name], **figures, "against": against}


def _changes(
    row: Row, described: Mapping[str, Any], answers: Mapping[str, Sequence[Row]], config: Config, job: Job
) -> list[Row]:
    """Return the changes of a model's figures from its nearest evaluated ancestor, paired by question or prompt."""
    old, new = row["before"], row["model"]
    if old is None:
        return []
    found: Row = {}
    for name, one in described[new].items():
        for figure, spec in one["means"].items():
            before, after = (means.select(answers[model], spec, name) for model in (old, new))
            path = figure if name == one["kind"] else f"{name}.{figure}"
            found[path] = means.paired_difference(before, after, spec, config.resamples, job.seed)
    found |= continuations.changes(answers[old], answers[new], config.resamples, job.seed)
    return [{"from": old, "to": new, "rate": rate, **change} for rate, change in found.items() if change]


def _toxicity(
    described: Mapping[str, Any], rows: Sequence[Row], answers: Mapping[str, list[Row]], config: Config, job: Job
) -> Row | None:
    """Return the classifier's figures and the toxicity of every category; None if no evaluation measured it."""
    found = (one for evaluations_of_model in described.values() for one in evaluations_of_model.values())
    measured = next((one for one in found if "classifier" in one), None)
    if not measured:
        return None
    header = {name: measured[name] for name in ("classifier", "ask", "continuations")}
    aligned = {row["model"]: row["against"] for row in rows if row["against"] and row["made_by"].startswith("align@")}
    return {**header, "categories": continuations.by_category(answers, aligned, config.resamples, job.seed)}
