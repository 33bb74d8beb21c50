"""The run report's evaluation: the sheet with what each step gained and cost, the gates, the figures at the top.

Changes of a rate come with the paired interval that `compare` has worked out; a change whose interval holds 0 is shown
as none. Other figures have no interval: changes under one in a hundred count as none.
"""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from flows import report_plots
from flows.report_parts import Part
from flows.report_plots import Whisker
from flows.results import Results

WON = "win_rate_over_tuned"
# (figure, heading, kind, 1 where more is better and -1 where less is)
DECODER = (
    ("exact_match_tuned", "Exact match, tuned questions", "share", 1),
    ("exact_match_heldout", "Exact match, held-out entities", "share", 1),
    ("perplexity", "Perplexity of held-out prose", "number", -1),
    ("bits_per_byte", "Bits a byte of held-out prose", "number", -1),
    ("reward_mean", "Mean reward of sampled replies", "points", 1),
    ("toxic_share", "Toxic continuations", "share", -1),
    (WON, "Wins over the tuned model, by the judge", "share", 1),
    ("distinct_2", "Different word pairs (distinct-2)", "share", 1),
    ("parameters", "Parameters", "count", -1),
    ("bytes", "Size", "bytes", -1),
)
ENCODER = (
    ("masked_names", "Masked names, right one first", "share", 1),
    ("parameters", "Parameters", "count", -1),
    ("bytes", "Size", "bytes", -1),
)
MODELS = {
    "base": "pretrained", "tuned": "fine-tuned", "policy": "aligned by {algorithm}", "pruned": "made smaller",
    "int8": "as it is served", "encoder": "masked pretraining", "encoder-int8": "as it is served",
}  # fmt: skip
COLOURS = {"base": "m1", "tuned": "m2", "policy": "m3", "pruned": "m4", "int8": "m5"}
IN_POINTS = ("ppo_reward_gain_min",)  # every other gate is a share


def evaluation(run: Results) -> Part:
    """Return the tables of decoders and encoders, the chart of exact match, and the gates."""
    models = run.sheet.get("models", [])
    if not models:
        return {}
    found = run.json("data/compare/differences.json") or []
    differences = {(item["to"], item["rate"]): item for item in found}
    encoders = [model for model in models if model.get("masked_names") is not None]
    decoders = [model for model in models if model not in encoders]
    questions = run.settings("evaluate@base").get("questions")
    return {
        "tables": [
            _table(rows, columns, differences, run.algorithm)
            for rows, columns in ((decoders, DECODER), (encoders, ENCODER))
            if rows
        ],
        "chart": _chart(decoders),
        "differences": found,
        "gates": _gates(run.sheet.get("gates", [])),
        "questions": questions,
        "toxicity": run.sheet.get("toxicity") or {},
    }


def tiles(run: Results) -> list[Part]:
    """Return the few figures that stand at the top of the page."""
    models = {str(model["model"]): model for model in run.sheet.get("models", [])}
    served = [model for model in models.values() if model.get("exact_match_tuned") is not None][-1:]
    encoder = [model for model in models.values() if model.get("masked_names") is not None][-1:]
    result: list[Part] = []
    for rows, figure, says in (
        (served, "exact_match_tuned", "exact match, tuned questions"),
        (served, "exact_match_heldout", "exact match, held-out entities"),
        (encoder, "masked_names", "masked names, right one first"),
    ):
        result += [
            {"kind": "share", "value": model[figure], "says": says, "of": model["model"]}
            for model in rows
            if model.get(figure) is not None
        ]
    if models.get("policy", {}).get(WON) is not None:
        says = "of replies preferred to the tuned model’s"
        result.append({"kind": "share", "value": models["policy"][WON], "says": says, "of": "policy"})
    elif {"tuned", "policy"} <= set(models) and models["policy"].get("reward_mean") is not None:
        gain = models["policy"]["reward_mean"] - models["tuned"]["reward_mean"]
        result.append(
            {"kind": "change", "value": gain, "says": f"rating points gained by {run.algorithm}", "of": "policy"}
        )
    ratio = run.metrics("quantize@policy").get("ratio")
    if ratio is not None:
        result.append({"kind": "times", "value": ratio, "says": "of the FP32 file's size", "of": "int8"})
    step = run.steps.get("quantize@policy")
    if step and "int8_tokens_per_second" in step.log:
        speed, times = step.log["int8_tokens_per_second"], step.log.get("int8_speedup")
        says = f"tokens a second, {times:.1f} × torch in FP32" if times else "tokens a second"
        result.append({"kind": "count", "value": speed, "says": says, "of": "int8"})
    return result


def _table(
    models: Sequence[Part], columns: Sequence[tuple[str, str, str, int]], differences: Mapping[tuple[str, str], Part],
    algorithm: str,
) -> Part:  # fmt: skip
    columns = [column for column in columns if any(model.get(column[0]) is not None for model in models)]
    rows = []
    for index, model in enumerate(models):
        before = models[index - 1] if index else {}
        name = str(model["model"])
        cells = [_cell(model, before, column, differences.get((name, column[0]))) for column in columns]
        rows.append({
            "model": name, "says": MODELS.get(name, "").format(algorithm=algorithm),
            "colour": COLOURS.get(name, "m1"), "cells": cells,
        })  # fmt: skip
    return {"columns": [heading for _, heading, _, _ in columns], "rows": rows}


def _cell(model: Part, before: Part, column: tuple[str, str, str, int], paired: Part | None) -> Part:
    figure, heading, kind, better = column
    value, earlier = model.get(figure), before.get(figure)
    cell: Part = {
        "value": value, "kind": kind, "heading": heading, "interval": model.get(f"{figure}_interval"),
        "spread": model.get("reward_std") if figure == "reward_mean" else None, "change": None,
    }  # fmt: skip
    if figure == WON or value is None or earlier is None or (value == earlier and not paired):
        return cell
    if paired:
        low, high = paired["interval"]
        change, verdict = paired["change"], (low > 0) - (high < 0)
    else:
        change = value - earlier
        verdict = 0 if abs(change) <= 0.01 * abs(earlier) else (1 if change > 0 else -1)
    if kind in ("count", "bytes", "number") and earlier:
        change, kind = value / earlier - 1, "relative"
    words = {1: "gain", -1: "cost", 0: "flat"}
    return {**cell, "change": change, "change_kind": kind, "verdict": words[verdict * better]}


def _chart(decoders: Sequence[Part]) -> Markup:
    groups = []
    for figure, name, colour in (
        ("exact_match_tuned", "tuned questions", "s1"),
        ("exact_match_heldout", "held-out entities", "s2"),
    ):
        values = [
            Whisker(place, model[figure], *(model.get(f"{figure}_interval") or (model[figure], model[figure])))
            for place, model in enumerate(decoders)
            if model.get(figure) is not None
        ]
        if values:
            groups.append((name, colour, values))
    if not groups:
        return Markup("")
    return report_plots.whiskers([str(model["model"]) for model in decoders], groups, "exact match")


def _gates(gates: Sequence[Part]) -> list[Part]:
    """Return the gates in words: those of the fields of `compare.gates`."""
    from tasks.compare import Gates

    says = {name: field.description or "" for name, field in Gates.model_fields.items()}
    return [
        {
            **gate,
            "says": says.get(gate["name"]) or str(gate["name"]).replace("_", " "),
            "kind": "points" if gate["name"] in IN_POINTS else "share",
            "at": "≤" if str(gate["name"]).endswith("_max") else "≥",
        }
        for gate in gates
    ]
