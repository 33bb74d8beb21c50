"""The parts of the run report: what each section shows, made from what `Results` finds.

A part is a function of the run that returns what the template needs, or an empty dictionary where the stages it tells
of have left nothing yet. Nothing here decides how it looks, apart from the charts.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup

from flows import report_lineage, report_plots
from flows.report_plots import Level, Series
from flows.results import DONE, Results, Step
from tasks.common.evaluation.agreement import RANKED

Part = dict[str, Any]

# (stage, title, what is drawn: column, name, colour; unit)
LOSSES = (
    ("pretrain@clm", "Causal pretraining", (("loss", "training", "s1"),), "nats a token"),
    ("pretrain@mlm", "Masked pretraining", (("loss", "training", "s1"),), "nats a masked token"),
    (
        "finetune",
        "Fine-tuning",
        (("task_loss", "answers", "s1"), ("pretraining_loss", "pretraining text", "s2")),
        "nats a token",
    ),
    ("reward@policy", "Reward model: ratings", (("rating_loss", "squared error", "s1"),), "squared rating points"),
    ("reward@policy", "Reward model: order", (("ordering_loss", "Bradley–Terry", "s1"),), "nats a pair"),
    ("prune", "Recovery after pruning", (("loss", "distance to the policy", "s1"),), "KL, nats a token"),
)
SHARE = "share"
PPO = (
    ("length", "Length of a reply", "tokens", "s3"),
    ("ended", "Replies that end by themselves", SHARE, "s3"),
    ("distinct_2", "Distinct word pairs", SHARE, "s3"),
    ("repetition", "Words said before in a reply, in threes", SHARE, "s3"),
    ("exact_match", "Held-out questions answered right", SHARE, "s1"),
    ("entropy", "Entropy of the policy", "nats a token", "s4"),
    ("clip_fraction", "Tokens held back by clipping", SHARE, "s5"),
    ("explained_variance", "Variance of returns that the values foretell", SHARE, "s4"),
    ("beta", "Price of KL (β)", "rating points a nat", "s2"),
    ("margin", "Preference for the better reply", "β × nats", "s4"),  # DPO's
    ("ptx_loss", "Loss on pretraining text", "nats a token", "s5"),
)
SECTIONS = {
    "ingest": "data", "validate": "data", "tokenize": "data", "pretrain": "training", "finetune": "training",
    "reward": "reward", "ppo": "ppo", "prune": "training", "quantize": "size", "evaluate": "evaluation",
    "compare": "evaluation", "package": "top",
}  # fmt: skip


def headline(run: Results) -> Part:
    """Return the model's tag, the verdict of the gates, and when, where and from which commit it was made."""
    package = run.steps.get("package")
    provenance = run.json("data/package/provenance.json")
    packaged = provenance and (package is None or (package.status in DONE and not package.stale))
    gates = run.sheet.get("gates", [])
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
        "place": _place(run),
        "numerics": _flat(next(filter(None, (step.record.get("numerics") for step in reversed(steps))), {})),
        "seed": next((step.record["seed"] for step in reversed(steps) if "seed" in step.record), None),
    }


def lineage(run: Results) -> Part:
    """Return the diagram of the stages."""
    if not isinstance(run.graph, dict):
        return {"problem": str(run.graph)}
    boxes = [
        report_lineage.Box(
            step.name, step.needs, step.status, step.hash("recipe")[:8], f"#{section(step.name)}", _told(step)
        )
        for step in run.steps.values()
    ]
    return {"svg": report_lineage.draw(boxes), "statuses": list(dict.fromkeys(box.status for box in boxes))}


def section(stage: str) -> str:
    """Return the section that tells of a stage."""
    return SECTIONS.get(stage.partition("@")[0], "stages")


def data(run: Results) -> Part:
    """Return the sources, the rows of the tables, why rows were refused, and the tokens."""
    settings = {str(source.get("name")): source for source in run.settings("ingest").get("sources", [])}
    sources = run.json("data/ingest/sources.json") or []
    for source in sources:
        named = settings.get(source["name"], {})
        source["from"] = named.get("requirement") or named.get("path") or ""
    return {
        "sources": sources,
        "tables": run.json("data/validate/report/validation.json") or [],
        "refused": _refused(run),
        "tokens": run.metrics("tokenize"),
    }


def training(run: Results) -> Part:
    """Return the loss curves."""
    charts = []
    for stage, title, columns, unit in LOSSES:
        rows = run.history(stage)
        series = [
            Series(name, colour, [(row["step"], row[column]) for row in rows if column in row])
            for column, name, colour in columns
        ]
        series = [item for item in series if any(value for _, value in item.points)]
        if series:
            heldout = run.metrics(stage).get("heldout_loss")
            levels = [Level(heldout, f"held out at the end: {heldout:.3f}")] if heldout is not None else []
            svg = report_plots.line(series, "step", unit, levels, zero=True)
            charts.append({"stage": stage, "title": title, "series": series, "unit": unit, "svg": svg})
    return {"charts": charts} if charts else {}


def reward(run: Results) -> Part:
    """Return how often PPO's reward model and the judge find people's order, beside a bag of words; calibration."""
    figures, judge = run.metrics("reward@policy"), run.metrics("reward@judge")
    if not figures:
        return {}
    gaps = [
        {"gap": name.removeprefix("gap_at_least_").removeprefix(RANKED), **value,
         "judge": (judge.get(name) or {}).get("model")}
        for name, value in figures.items()
        if (name.startswith("gap_at_least_") or name == RANKED) and value.get("pairs")
    ]  # fmt: skip
    points = [(item["predicted"], item["rated"]) for item in figures.get("calibration", [])]
    return {
        "figures": figures,
        "gaps": gaps,
        "calibration": report_plots.calibration(points, "predicted rating, points", "people's rating, points"),
        "base": run.settings("reward@policy").get("model", ""),
        "words": run.settings("reward@policy").get("words", False),
        "conversation": run.settings("reward@policy").get("reads") == "conversation",
        "judge": judge,
        "length": figures.get("length") or {},
    }


def ppo(run: Results) -> Part:
    """Return the curves of PPO, or of what stood in its place, and its first and last figures."""
    rows = run.history("ppo")
    if not rows:
        return {}
    target = ((run.settings("ppo").get("algorithm") or {}).get("kl") or {}).get("target")
    mean = Series("mean", "s1", _points(rows, "reward"), [row.get("reward_std", 0.0) for row in rows])
    levels = [Level(float(target), f"target: {target:g}")] if target is not None else []
    charts = [
        ("Reward of fresh replies", report_plots.line([mean], "iteration", "rating points")),
        ("Distance from the tuned model", _curve(rows, "kl", "KL, nats a reply", "s2", levels)),
    ]
    steered = run.algorithm == "PPO"  # the others' price stays what the settings say
    charts += [
        (title, _curve(rows, column, unit, colour))
        for column, title, unit, colour in PPO
        if steered or column != "beta"
    ]
    return {
        "algorithm": run.algorithm, "charts": [(title, svg) for title, svg in charts if svg], "first": rows[0],
        "last": rows[-1],
    }  # fmt: skip


def size(run: Results) -> Part:
    """Return the models' sizes, INT8's against FP32's, and the speeds that were measured."""
    models = [model for model in run.sheet.get("models", []) if model.get("bytes")]
    largest = max((model["bytes"] for model in models), default=1)
    exports = []
    for key in ("policy", "encoder"):
        figures = run.metrics(f"quantize@{key}")
        if figures:
            exports.append({"key": key, **figures})
    step = run.steps.get("quantize@policy")
    log = step.log if step else {}
    speeds = [
        (name, log[column])
        for name, column in (("torch, FP32", "torch_fp32_tokens_per_second"), ("INT8", "int8_tokens_per_second"))
        if column in log
    ]
    if not models and not exports:
        return {}
    return {
        "models": [{**model, "share": model["bytes"] / largest} for model in models],
        "exports": exports,
        "speeds": speeds,
        "speedup": log.get("int8_speedup"),
        "host": log.get("host", ""),
    }


def stages(run: Results) -> Part:
    """Return what each stage took and, by the machine's price, cost; and when in the run it was at work."""
    placement = run.params.get("placement") or {}
    price = float(placement.get("cost_per_hour") or 0.0)
    first, last = _span([step for step in run.steps.values() if step.log and run.own(step.log)])
    rows = []
    for step in run.steps.values():
        bar = None
        if step.log and run.own(step.log) and step.seconds is not None and last > first:
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
        "side_by_side": placement.get("side_by_side"),
    }


def _place(run: Results) -> Part:
    """Return when and where the run's stages ran, from their logs; empty where none of them did."""
    logs = [step.log for step in run.steps.values() if step.log]
    own = [log for log in logs if run.own(log)] or logs
    if not own:
        return {}
    last = max(own, key=lambda log: str(log.get("started", "")))
    return {
        "started": _moment(min(str(log.get("started", "")) for log in own)),
        "earlier": not any(run.own(log) for log in logs),
        "hosts": sorted({str(log["host"]) for log in own if log.get("host")}),
        "machine": last.get("machine", ""),
        "python": last.get("python", ""),
        "commit": last.get("commit") or "",
        "dirty": last.get("dirty"),
    }


def _flat(settings: Mapping[str, Any], before: str = "") -> list[str]:
    """Return settings as words, nested ones with the name of their group: `dtype decoder bfloat16`."""
    return [
        words
        for name, value in settings.items()
        for words in (
            _flat(value, f"{before}{name} ") if isinstance(value, Mapping) else [f"{before}{name} {value}".lower()]
        )
    ]


def _moment(text: str) -> str:
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%d %B %Y, %H:%M} UTC".lstrip("0")
    except ValueError:
        return text


def _start(step: Step) -> float:
    return datetime.fromisoformat(str(step.log["started"])).timestamp()


def _span(steps: Sequence[Step]) -> tuple[float, float]:
    spans = [(_start(step), _start(step) + (step.seconds or 0.0)) for step in steps if "started" in step.log]
    return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else (0.0, 0.0)


def _told(step: Step) -> str:
    lines = [f"{step.name}: {step.status}", step.message, f"out of date: {step.stale}" if step.stale else ""]
    lines += [f"{part} {step.hash(part)}" for part in ("recipe", "content") if step.hash(part)]
    if step.seconds is not None:
        lines.append(f"took {timedelta(seconds=round(step.seconds))}")
    return "\n".join(line for line in lines if line)


def _refused(run: Results) -> list[Part]:
    """Return why `ingest` left rows of a source out, most frequent first, each with its count and some examples.

    What a reason says after a colon is about its row alone, so it goes to the example.
    """
    path = run.project / "data/ingest/refused.jsonl"
    if not path.exists():
        return []
    found: dict[tuple[str, str], list[str]] = {}
    with path.open(encoding="utf-8") as file:
        for text in file:
            row = json.loads(text)
            reason, _, rest = str(row["reason"]).partition(": ")
            found.setdefault((str(row["source"]), reason), []).append(f"{row['row']}{f' ({rest})' if rest else ''}")
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [
        {"source": source, "reason": reason, "count": len(rows), "examples": rows[:3]}
        for (source, reason), rows in ordered
    ]


def _points(rows: Sequence[dict[str, float]], column: str) -> list[tuple[float, float]]:
    return [(row["step"], row.get(column, math.nan)) for row in rows]


def _curve(
    rows: Sequence[dict[str, float]], column: str, unit: str, colour: str, levels: Sequence[Level] = ()
) -> Markup:
    if not any(column in row for row in rows):
        return Markup("")
    series = [Series(unit, colour, _points(rows, column))]
    return report_plots.line(series, "iteration", unit, levels, zero=True, percent=unit == SHARE)
