"""The sections of the run report: functions that turn `Results` into values for the template.

A function returns an empty dictionary if the stages of its section have no results yet. Apart from the charts, the
template decides the presentation.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup

from flows.report import plots
from flows.report.lineage import Box, draw
from flows.report.plots import Level, Series
from flows.results import DONE_STATUSES, Results, Step
from tasks.common.reward.agreement import RANKED_ONLY

Part = dict[str, Any]

# stage: charts of each of its entries as (title, lines as (column, name, colour), unit)
LOSS_CHARTS: dict[str, tuple[tuple[str, tuple[tuple[str, str, str], ...], str], ...]] = {
    "pretrain": (("Pretraining", (("loss", "training", "s1"),), "nats per predicted token"),),
    "finetune": (
        (
            "Fine-tuning",
            (("task_loss", "answers", "s1"), ("pretraining_loss", "pretraining text", "s2")),
            "nats per token",
        ),
    ),
    "reward": (
        ("Ratings", (("rating_loss", "squared error", "s1"),), "squared rating points"),
        ("Rankings", (("ordering_loss", "ranking loss", "s1"),), "nats per pair or choice"),
    ),
    "prune": (("Distillation after pruning", (("loss", "KL to the parent model", "s1"),), "KL, nats per token"),),
}
SHARE_UNIT = "share"
PLACE_PATTERN = re.compile(r"^.+?, (?:line|row|item|paragraph) \d+(?:, (?:item|answer) \d+)?: ")  # of a rejected row
SHOWN_EXAMPLES = 3
ALIGNMENT_CURVES = (
    ("length", "Length of a reply", "tokens", "s3"),
    ("ended", "Replies that end with the end token", SHARE_UNIT, "s3"),
    ("distinct_2", "Distinct word pairs", SHARE_UNIT, "s3"),
    ("repetition", "Repeated word triples within a reply", SHARE_UNIT, "s3"),
    ("exact_match", "Exact match on held-out questions", SHARE_UNIT, "s1"),
    ("entropy", "Entropy of the policy", "nats per token", "s4"),
    ("clip_fraction", "Clipped tokens", SHARE_UNIT, "s5"),
    ("explained_variance", "Explained variance of the returns", SHARE_UNIT, "s4"),
    ("beta", "KL coefficient (β)", "rating points per nat", "s2"),
    ("margin", "Reward margin of the preferred reply", "β × nats", "s4"),  # DPO
    ("ptx_loss", "Loss on pretraining text", "nats per token", "s5"),
)
STAGE_SECTIONS = {
    "ingest": "data", "validate": "data", "tokenize": "data", "pretrain": "training", "finetune": "training",
    "reward": "reward", "align": "alignment", "prune": "training", "quantize": "size", "evaluate": "evaluation",
    "compare": "evaluation", "package": "top",
}  # fmt: skip


def headline(run: Results) -> Part:
    """Return the model's tag, the result of the gates, and when, where and from which commit it was made."""
    package = run.steps.get("package")
    provenance = run.json("data/package/provenance.json")
    packaged = provenance and (package is None or (package.status in DONE_STATUSES and not package.stale))
    gates = run.scorecard.get("gates", [])
    steps = list(run.steps.values())
    counts = Counter(step.status for step in steps)
    return {
        "model": provenance["model"] if packaged else "",
        "before": provenance["model"] if provenance and not packaged else "",
        "gates": len(gates),
        "earlier": "compare" in run.steps and bool(run.steps["compare"].stale),
        "passed": sum(bool(gate["passed"]) for gate in gates),
        "failures": [step for step in steps if step.status == "failed"],
        "stopped": [step for step in steps if step.status == "stopped"],
        "stale": [step for step in steps if step.stale],
        "counts": [(status, count) for status, count in counts.most_common()],
        "environment": _environment(run),
        "numerics": _flatten(next(filter(None, (step.record.get("numerics") for step in reversed(steps))), {})),
        "seed": next((step.record["seed"] for step in reversed(steps) if "seed" in step.record), None),
    }


def lineage(run: Results) -> Part:
    """Return the diagram of the stages."""
    if not isinstance(run.graph, dict):
        return {"problem": str(run.graph)}
    boxes = [
        Box(step.name, step.needs, step.status, step.hash("recipe")[:8], f"#{section(step.name)}", _step_title(step))
        for step in run.steps.values()
    ]
    return {"svg": draw(boxes), "statuses": list(dict.fromkeys(box.status for box in boxes))}


def section(stage: str) -> str:
    """Return the id of a stage's section."""
    return STAGE_SECTIONS.get(stage.partition("@")[0], "stages")


def data(run: Results) -> Part:
    """Return the sources, the rows of the tables, why rows were rejected, and the tokens."""
    settings = {str(source.get("name")): source for source in run.settings("ingest").get("sources", [])}
    sources = run.json("data/ingest/sources.json") or []
    for source in sources:
        named = settings.get(source["name"], {})
        source["from"] = named.get("requirement") or named.get("path") or ""
    return {
        "sources": sources,
        "unknown_licences": [source["name"] for source in sources if source.get("licence") == "unknown"],
        "tables": [
            {"rejected": item.get("refused", 0), **item}  # `refused` in files before 0.2
            for item in run.json("data/validate/report/validation.json") or []
        ],
        "rejected": _rejected_rows(run),
        "tokens": run.metrics("tokenize"),
    }


def training(run: Results) -> Part:
    """Return the loss curves of every trained entry."""
    charts = []
    for stage, chart_specs in LOSS_CHARTS.items():
        for name in run.entries(stage):
            charts += [
                chart for title, columns, unit in chart_specs if (chart := _loss_chart(run, name, title, columns, unit))
            ]
    return {"charts": charts} if charts else {}


def _loss_chart(run: Results, name: str, title: str, columns: Sequence[tuple[str, str, str]], unit: str) -> Part:
    """Return a chart of these columns of an entry's history; empty if it has none of them."""
    rows = run.history(name)
    series = [
        Series(label, colour, [(row["step"], row[column]) for row in rows if column in row])
        for column, label, colour in columns
    ]
    series = [item for item in series if any(value for _, value in item.points)]
    if not series:
        return {}
    heldout = run.metrics(name).get("heldout_loss")
    levels = [Level(heldout, f"final held-out loss: {heldout:.3f}")] if heldout is not None else []
    svg = plots.line(series, "step", unit, levels, zero=True)
    return {"stage": name, "title": f"{title}: {name}", "series": series, "unit": unit, "svg": svg}


def reward(run: Results) -> Part:
    """Return each reward model's accuracy on people's order beside the bag of words and the judge, and calibration."""
    roles = {name: run.settings(name).get("role") for name in run.entries("reward")}
    judges = [name for name, role in roles.items() if role == "judge"]
    judge = run.metrics(judges[0]) if judges else {}
    found = [_reward_model(run, name, judge) for name, role in roles.items() if role == "train" and run.metrics(name)]
    return {"models": found, "judge": judge} if found else {}


def _reward_model(run: Results, name: str, judge: Mapping[str, Any]) -> Part:
    figures, settings = run.metrics(name), run.settings(name)
    gaps = [
        {"gap": gap.removeprefix("gap_at_least_").removeprefix(RANKED_ONLY), **value,
         "judge": (judge.get(gap) or {}).get("model")}
        for gap, value in figures.items()
        if (gap.startswith("gap_at_least_") or gap == RANKED_ONLY) and value.get("pairs")
    ]  # fmt: skip
    points = [(item["predicted"], item["rated"]) for item in figures.get("calibration", [])]
    return {
        "name": name,
        "figures": figures,
        "gaps": gaps,
        "calibration": plots.calibration(points, "predicted rating, points", "people's rating, points"),
        "base": settings.get("model", ""),
        "lexicon": settings.get("lexicon", False),
        "conversation": settings.get("input") == "conversation",
        "length": figures.get("length") or {},
    }


def alignment(run: Results) -> Part:
    """Return the curves of every alignment, and its first and last rows."""
    found = [_alignment_curves(run, name) for name in run.entries("align") if run.history(name)]
    return {"models": found} if found else {}


def _alignment_curves(run: Results, name: str) -> Part:
    rows, algorithm = run.history(name), run.algorithm(name)
    target = ((run.settings(name).get("algorithm") or {}).get("kl") or {}).get("target")
    rewards = Series("mean", "s1", _points(rows, "reward"), [row.get("reward_std", 0.0) for row in rows])
    levels = [Level(float(target), f"target: {target:g}")] if target is not None else []
    charts = [
        ("Reward of sampled replies", plots.line([rewards], "iteration", "reward")),
        ("KL divergence from the reference model", _curve(rows, "kl", "KL, nats per reply", "s2", levels)),
    ]
    has_adaptive_beta = algorithm == "PPO"  # other algorithms keep β constant
    charts += [
        (title, _curve(rows, column, unit, colour))
        for column, title, unit, colour in ALIGNMENT_CURVES
        if has_adaptive_beta or column != "beta"
    ]
    shown = [(title, svg) for title, svg in charts if svg]
    return {"name": name, "algorithm": algorithm, "charts": shown, "first": rows[0], "last": rows[-1]}


def size(run: Results) -> Part:
    """Return the models' sizes, the exports' sizes relative to FP32, and the measured speeds."""
    models = [model for model in run.scorecard.get("models", []) if model.get("bytes")]
    largest = max((model["bytes"] for model in models), default=1)
    names = run.entries("quantize")
    exports = [{"key": name, **run.metrics(name)} for name in names if run.metrics(name)]
    if not models and not exports:
        return {}
    return {
        "models": [{**model, "share": model["bytes"] / largest} for model in models],
        "exports": exports,
        "speeds": [found for name in names if (found := _speed(name, run.steps[name].log))],
    }


def _speed(name: str, log: Mapping[str, Any]) -> Part:
    """Return an export's decoding speed and that of torch, measured at the export; empty if not measured."""
    columns = (("torch, FP32", "torch_fp32_tokens_per_second"), ("INT8", "int8_tokens_per_second"))
    found = [(label, log[column]) for label, column in columns if column in log]
    return (
        {"name": name, "speeds": found, "speedup": log.get("int8_speedup"), "host": log.get("host", "")}
        if found
        else {}
    )


def stages(run: Results) -> Part:
    """Return each stage's duration and cost, and its position on the run's time line."""
    placement = run.params.get("placement") or {}
    price = float(placement.get("cost_per_hour") or 0.0)
    first, last = _time_span([step for step in run.steps.values() if step.log and run.belongs_to_run(step.log)])
    rows = []
    for step in run.steps.values():
        bar = None
        if step.log and run.belongs_to_run(step.log) and step.seconds is not None and last > first:
            bar = (100 * (_start(step) - first) / (last - first), 100 * step.seconds / (last - first))
        cost = None if step.seconds is None else step.seconds / 3600 * price
        rows.append({"step": step, "cost": cost, "bar": bar, "link": section(step.name)})
    known = [step.seconds for step in run.steps.values() if step.seconds is not None]
    peaks = [step.log["peak_memory_bytes"] for step in run.steps.values() if "peak_memory_bytes" in step.log]
    if not rows:
        return {}
    return {
        "rows": rows,
        "seconds": sum(known),
        "wall": last - first if last > first else None,
        "cost": sum(known) / 3600 * price,
        "wall_cost": (last - first) / 3600 * price if last > first else None,
        "peak": max(peaks, default=None),
        "price": price,
        "currency": placement.get("currency", ""),
        "max_parallel_stages": placement.get("max_parallel_stages"),
    }


def _environment(run: Results) -> Part:
    """Return when and where the run's stages ran, from their logs; empty without logs."""
    logs = [step.log for step in run.steps.values() if step.log]
    run_logs = [log for log in logs if run.belongs_to_run(log)] or logs
    if not run_logs:
        return {}
    last = max(run_logs, key=lambda log: str(log.get("started", "")))
    return {
        "started": _format_time(min(str(log.get("started", "")) for log in run_logs)),
        "earlier": not any(run.belongs_to_run(log) for log in logs),
        "hosts": sorted({str(log["host"]) for log in run_logs if log.get("host")}),
        "machine": last.get("machine", ""),
        "python": last.get("python", ""),
        "commit": last.get("commit") or "",
        "dirty": last.get("dirty"),
    }


def _flatten(settings: Mapping[str, Any], before: str = "") -> list[str]:
    """Return settings as words, nested ones with their groups as prefix: `dtype decoder bfloat16`."""
    return [
        words
        for name, value in settings.items()
        for words in (
            _flatten(value, f"{before}{name} ") if isinstance(value, Mapping) else [f"{before}{name} {value}".lower()]
        )
    ]


def _format_time(text: str) -> str:
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%d %B %Y, %H:%M} UTC".lstrip("0")
    except ValueError:
        return text


def _start(step: Step) -> float:
    return datetime.fromisoformat(str(step.log["started"])).timestamp()


def _time_span(steps: Sequence[Step]) -> tuple[float, float]:
    spans = [(_start(step), _start(step) + (step.seconds or 0.0)) for step in steps if "started" in step.log]
    return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else (0.0, 0.0)


def _step_title(step: Step) -> str:
    lines = [f"{step.name}: {step.status}", step.message, f"out of date: {step.stale}" if step.stale else ""]
    lines += [f"{part} {step.hash(part)}" for part in ("recipe", "content") if step.hash(part)]
    if step.seconds is not None:
        lines.append(f"took {timedelta(seconds=round(step.seconds))}")
    return "\n".join(line for line in lines if line)


def _rejected_rows(run: Results) -> list[Part]:
    """Return why `ingest` rejected rows, the most frequent reason first, each with its count and some examples.

    The place of a row is not part of the reason. The text of a reason after a colon is specific to the row, so it is
    part of the example.
    """
    path = run.project / "data/ingest/rejected.jsonl"
    if not path.exists():
        return []
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[str]] = {}
    with path.open(encoding="utf-8") as file:
        for text in file:
            row = json.loads(text)
            placed = PLACE_PATTERN.sub("", str(row["reason"]).removeprefix(f"{row['row']}: "))
            reason, _, rest = placed.partition(": ")
            key = str(row["source"]), reason
            counts[key] += 1
            if counts[key] <= SHOWN_EXAMPLES:
                examples.setdefault(key, []).append(f"{row['row']}{f' ({rest})' if rest else ''}")
    return [
        {"source": source, "reason": reason, "count": count, "examples": examples[source, reason]}
        for (source, reason), count in counts.most_common()
    ]


def _points(rows: Sequence[dict[str, float]], column: str) -> list[tuple[float, float]]:
    return [(row["step"], row.get(column, math.nan)) for row in rows]


def _curve(
    rows: Sequence[dict[str, float]], column: str, unit: str, colour: str, levels: Sequence[Level] = ()
) -> Markup:
    if not any(column in row for row in rows):
        return Markup("")
    series = [Series(unit, colour, _points(rows, column))]
    return plots.line(series, "iteration", unit, levels, zero=True, percent=unit == SHARE_UNIT)
