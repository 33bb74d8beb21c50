"""Gates that settings already rule out: unknown models, and figures that nothing can give.

The kinds of evaluation say themselves which figures they can give for a model (`tasks/evaluate/evaluation.py`). What
they need to know of it (its kind, the reward models, the tables that sources can fill) follows from the settings. A
fact that does not follow counts as possible.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tasks.common.harness.job import module_of
from tasks.common.harness.lineage import evaluations, model_before_alignment
from tasks.common.model_graph import Params, entries_of, links_of, lookup
from tasks.common.settings import ENTRY_STAGES
from tasks.rules import data
from tasks.rules.model_kinds import ModelKinds

SIZES = ("parameters", "bytes")  # of every evaluated model
HEADS = {"classification": False, "regression": True}  # kind: whether the model gives a number
LOSSES = ("loss", "*_loss")
STAGE_FIGURES = {  # patterns of the figures in each stage's metrics, by their first part
    "pretrain": ("parameters", "steps", *LOSSES, "bits_per_byte", "documents*"),
    "finetune": (
        "conversations", "rejected", "epochs", *LOSSES, "heldout*", "labels", "*accuracy", "macro_f1", "*rmse",
        "pearson", "spearman",
    ),
    "reward": (
        "accuracy", "*rankings*", "alike_pairs", "truncated_responses", "score_mean_std", *LOSSES, "heldout*",
        "gap_at_least_*", "ranked_only", "disagreement", "length", "calibration",
    ),
    "align": ("updates", "rolled_back_to", "*_first", "*_last"),
    "prune": ("parameters*", "removed", "feed_forward", *LOSSES),
    "quantize": ("bytes", "fp32_bytes", "ratio", "fp32_difference"),
}  # fmt: skip


def check_gates(params: Params, sources: data.SourceTables) -> Iterator[str]:
    """Report gates on unknown models, and on figures that their models cannot have; the graph must have no cycles."""
    gates = lookup(params, "compare.gates")
    if not isinstance(gates, list) or not gates:
        return
    if not entries_of(params, "evaluate"):
        yield (
            f"compare.gates: found {len(gates)} gate{'s' * (len(gates) > 1)}, but without an entry of evaluate there "
            "is no scorecard to check: add an entry, or set gates to []"
        )
        return
    possible = possible_figures(params, sources)
    stages = {f"{stage}@{key}" for stage in ENTRY_STAGES[:-1] for key in entries_of(params, stage)}
    for number, gate in enumerate(gates):
        metric, model, against = (lookup(gate, key) for key in ("metric", "model", "against"))
        where, evaluated = f"compare.gates.{number}", model in possible
        for setting, name in (("model", model), ("against", against)):
            names = stages | set(possible) if setting == "model" else set(possible) if evaluated else stages
            if not isinstance(name, str) or (setting == "against" and model not in names | stages | set(possible)):
                continue
            if name not in names:
                yield f"{where}.{setting}: found {name!r}, but it should be {_known(possible, stages)}"
            elif isinstance(metric, str) and (problem := _check_metric(metric, name, possible, stages)):
                yield f"{where}.metric: found {metric!r}, but {problem}"


def _known(possible: Mapping[str, Any], stages: set[str]) -> str:
    example = next(iter(sorted(stages)), "prune@small")
    return f"an entry of evaluate ({', '.join(possible) or 'none'}), or a stage with metrics, such as {example}"


def _check_metric(metric: str, model: str, possible: Mapping[str, Sequence[str] | None], stages: set[str]) -> str:
    """Return why a model or stage cannot have a figure, and what it can have; "" if it can."""
    figures = STAGE_FIGURES[model.partition("@")[0]] if model in stages else possible[model]
    name = metric.partition(".")[0] if model in stages else metric
    if figures is None or any(fnmatchcase(name, figure) for figure in figures):
        return ""
    return f"{model} can have {', '.join(figures)}"


def possible_figures(params: Params, sources: data.SourceTables) -> dict[str, list[str] | None]:
    """Return the figures that each entry of evaluate can have; None where the evaluations are invalid."""
    listed = _evaluations(params)
    found: dict[str, list[str] | None] = {}
    for entry, facts in _facts(params, sources).items():
        figures = None if listed is None else [*SIZES]
        for name, one in (listed or {}).items():
            if figures is not None and one.is_for(entry, facts.kind):
                prefix = "" if name == one.KIND else f"{name}."
                figures += [f"{prefix}{figure}" for figure in one.possible_figures(facts)]
        found[entry] = figures
    return found


def _facts(params: Params, sources: data.SourceTables) -> dict[str, Any]:
    """Return what evaluations need to know of each evaluated model (`Facts`), by the entry of evaluate."""
    links, kinds, tables = links_of(params), ModelKinds(params), _tables(sources)
    return {
        link.key: module_of("evaluate").Facts(
            entry=link.key,
            kind=_kind(kinds, link.reads[0]) if link.reads else None,
            numeric=HEADS.get(str(_graph_kind(kinds, link.reads[0]))) if link.reads else None,
            roles=frozenset(str(lookup(one, "role")) for one in entries_of(params, "reward").values()),
            before=model_before_alignment(link, links) if link.reads else None,
            **tables,
        )
        for link in evaluations(links)
    }


def _evaluations(params: Params) -> dict[str, Any] | None:
    """Return the evaluations; None if one is invalid, which is reported elsewhere."""
    stage = module_of("evaluate")
    try:
        kind: TypeAdapter[Any] = TypeAdapter(stage.AnyEvaluation)
        found = {name: kind.validate_python(one) for name, one in entries_of(params, "evaluations").items()}
    except ValidationError:
        return None
    return found or dict(stage.default_evaluations())


def _kind(kinds: ModelKinds, folder: str) -> str | None:
    """Return the kind of an evaluated model: causal, masked or classifier; None if unknown."""
    found: str | None = module_of("evaluate").model_kind_of(_graph_kind(kinds, folder))
    return found


def _graph_kind(kinds: ModelKinds, folder: str) -> str | None:
    """Return the kind of a model as the graph names it; of an export that of its parent."""
    kind, producer = kinds.kind(folder), kinds.producer(folder)
    return kinds.kind(lookup(producer.settings, "model")) if kind == "engine" and producer else kind


def _tables(sources: data.SourceTables) -> dict[str, bool]:
    """Return which tables, and whether short answers, the sources can give."""
    provided = set[str]().union(*(tables for _, tables in sources))
    found = {name: name in provided for name in ("corpus", "instructions", "rankings")}
    return {**found, "answers": data.gives_answers(sources)}


def check_evaluations(params: Params) -> Iterator[str]:
    """Report evaluations for entries that do not exist, and for models that they do not apply to."""
    listed, kinds = _evaluations(params) or {}, ModelKinds(params)
    evaluated = entries_of(params, "evaluate")
    for name, one in listed.items():
        against = getattr(one, "against", None)
        if against is not None and against not in evaluated:
            names = ", ".join(evaluated) or "none"
            yield f"evaluations.{name}.against: found {against!r}, but the entries of evaluate are {names}"
        for number, entry in enumerate(one.models or ()):
            where = f"evaluations.{name}.models.{number}"
            if entry not in evaluated:
                yield f"{where}: found {entry!r}, but the entries of evaluate are {', '.join(evaluated) or 'none'}"
            elif not one.is_for(entry, kind := _kind(kinds, str(lookup(evaluated[entry], "model")))):
                yield f"{where}: found {entry!r}, a {kind} model, but {one.KIND} applies to: {one.APPLIES_TO}"


def check_data_of_evaluations(params: Params, sources: data.SourceTables) -> Iterator[str]:
    """Report evaluations that can give no figure of any model: data, a reward model or a model is missing."""
    facts = _facts(params, sources)
    for name, one in (_evaluations(params) or {}).items() if entries_of(params, "evaluations") else ():
        suitable = [fact for entry, fact in facts.items() if one.is_for(entry, fact.kind)]
        if facts and not any(one.possible_figures(fact) for fact in suitable):
            yield (
                f"evaluations.{name}: it can give no figure of any entry of evaluate with this data. {one.KIND} "
                f"applies to: {one.APPLIES_TO.rstrip('.')}. Add what is missing, or remove the evaluation"
            )


def check_keys(params: Params) -> Iterator[str]:
    """Report API keys of judges that are not in the environment of this process."""
    for name, one in (_evaluations(params) or {}).items():
        variable = getattr(getattr(one, "by", None), "key_variable", None)
        if variable and not os.environ.get(variable):
            yield (
                f"evaluations.{name}.by.key_variable: found {variable!r}, but this environment variable is not set: "
                "set it to the API key, or remove the setting if the endpoint needs none"
            )
