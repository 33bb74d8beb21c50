"""The section "Evaluation" of the run report: the scorecard with each step's changes, the gates, and the top figures.

Models are listed in graph order, each with its changes from its nearest evaluated ancestor. Changes of a rate have the
paired interval computed by `compare`; a change whose interval contains 0 is shown as no change. Other figures have no
interval: changes of at most 1 % are shown as no change.
"""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from flows.records import gate_limits, gate_words
from flows.report import plots
from flows.report.parts import Part
from flows.report.plots import Whisker
from flows.results import Results

WIN_RATE = "win_rate"
IMPLICIT = "implicit_reward_accuracy"
Column = tuple[str, str, str, int]
SIZE_COLUMNS = (("parameters", "Parameters", "count", -1), ("bytes", "Size", "bytes", -1))
# (figure, heading, kind, 1 if higher is better and -1 if lower is better)
ANSWER_COLUMNS = (
    ("exact_match_seen", "Exact match, seen entities", "share", 1),
    ("exact_match_heldout", "Exact match, held-out entities", "share", 1),
    ("answer_loss", "Loss of held-out answers, nats a token", "number", -1),
    ("answer_bits_per_byte", "Bits per byte of held-out answers", "number", -1),
    ("answer_token_accuracy", "Tokens of held-out answers predicted", "share", 1),
    ("answer_calibration_error", "Calibration error", "share", -1),
    ("chrf", "chrF with references", "share", 1),
    ("rouge_l", "ROUGE-L with references", "share", 1),
    ("preference_accuracy", "Preferred replies likelier", "share", 1),
    (IMPLICIT, "Preferred replies gained more", "share", 1),
    ("abstained_out_of_scope", "Declined, out of scope", "share", 1),
    ("abstained_in_scope", "Declined, in scope", "share", -1),
)
REPLY_COLUMNS = (
    ("perplexity", "Perplexity of held-out text", "number", -1),
    ("bits_per_byte", "Bits per byte of held-out text", "number", -1),
    ("reward_mean", "Mean reward of sampled replies", "points", 1),
    ("toxic_share", "Toxic continuations", "share", -1),
    (WIN_RATE, "Win rate against the model before alignment, by the judge", "share", 1),
    ("distinct_2", "Distinct word pairs (distinct-2)", "share", 1),
    ("repetition", "Repeated word triples", "share", -1),
    *SIZE_COLUMNS,
)
ENCODER_COLUMNS = (("masked_names", "Masked names, top-1 accuracy", "share", 1), *SIZE_COLUMNS)
CLASSIFIER_COLUMNS = (
    ("accuracy", "Accuracy on held-out texts", "share", 1),
    ("majority_label_accuracy", "Accuracy of the most frequent label", "share", 1),
    ("macro_f1", "Macro F1", "share", 1),
    ("label_calibration_error", "Calibration error", "share", -1),
    ("mean_absolute_error", "Mean absolute error on held-out texts", "number", -1),
    ("rmse", "Root mean squared error", "number", -1),
    ("mean_baseline_rmse", "Root mean squared error of the training mean", "number", -1),
    ("pearson", "Pearson correlation", "number", 1),
    ("spearman", "Spearman rank correlation", "number", 1),
    *SIZE_COLUMNS,
)
TABLES: tuple[tuple[str, Sequence[Column]], ...] = (
    ("causal", ANSWER_COLUMNS), ("causal", REPLY_COLUMNS), ("masked", ENCODER_COLUMNS),
    ("classifier", CLASSIFIER_COLUMNS),
)  # fmt: skip
FIGURES = {column[0]: column for _, columns in TABLES for column in columns}
# Figures that another one shows, or that are not compared.
NOT_SHOWN = ("reward_std", "toxicity_mean", "masked_statements", "candidates")
NOT_FIGURES = ("model", "made_by", "kind", "before", "against", "by_seen_text")
SUFFIXES = ("_interval", "_stderr", ".samples", ".sample_len")
SEEN_TEXT_GROUPS = (("seen", "seen"), ("nearly", "nearly seen"), ("unseen", "unseen"))
COLOURS = ("m1", "m2", "m3", "m4", "m5")


def evaluation(run: Results) -> Part:
    """Return tables of the models' figures, those by seen text, what was measured, the chart and the gates."""
    models = [flatten(model) for model in run.scorecard.get("models", [])]
    if not models:
        return {}
    found = [{**item, "kind": column_of(item["rate"])[2]} for item in run.json("data/compare/differences.json") or []]
    differences = {(item["to"], item["rate"]): item for item in found}
    kinds = [([model for model in models if model.get("kind") == kind], columns) for kind, columns in TABLES]
    causal = kinds[0][0]
    kinds.insert(2, (causal, named_columns(causal)))
    tables = [_table(run, rows, columns, differences) for rows, columns in kinds if rows]
    evaluations, exact = run.entries("evaluate"), any(model.get("exact_match_seen") is not None for model in models)
    return {
        "tables": [table for table in tables if table["columns"]],
        "seen_text": _seen_text(models),
        "described": _described(run),
        "chart": _chart(causal),
        "differences": found,
        "gates": [
            {**gate, "label": gate_words(gate), "limits": gate_limits(gate)} for gate in run.scorecard.get("gates", [])
        ],
        "questions": run.settings(evaluations[0]).get("questions") if evaluations and exact else None,
        "toxicity": run.scorecard.get("toxicity") or {},
    }


def flatten(model: Part) -> Part:
    """Return a model's row with the figures of named evaluations and tasks by their path: `mine.chrf`."""
    flat: Part = {}
    for name, value in model.items():
        if isinstance(value, Mapping) and name not in NOT_FIGURES:
            flat |= {f"{name}.{figure}": one for figure, one in value.items()}
        else:
            flat[name] = value
    return flat


def column_of(figure: str) -> Column:
    """Return the column of a figure; one of a named evaluation is shown like that of its kind."""
    name, _, last = figure.rpartition(".")
    known = FIGURES.get(last)
    if known is None:
        words = last.replace("_", " ")
        return figure, f"{name}: {words}" if name else words, "number", 1
    return (figure, f"{name}: {known[1]}", *known[2:]) if name else known


def named_columns(models: Sequence[Part]) -> list[Column]:
    """Return columns for the figures of named evaluations and of tasks of lm-evaluation-harness."""
    names = dict.fromkeys(name for model in models for name, value in model.items() if isinstance(value, int | float))
    hidden = {*FIGURES, *NOT_SHOWN, *NOT_FIGURES}
    return [column_of(name) for name in names if name not in hidden and not name.endswith(SUFFIXES)]


def _seen_text(models: Sequence[Part]) -> list[Part]:
    """Return each figure by seen, nearly seen and unseen text, a row for each model."""
    found = []
    for model in models:
        for figure, groups in (model.get("by_seen_text") or {}).items():
            _, heading, kind, _ = column_of(figure)
            cells = [{"kind": kind, **groups[name]} if name in groups else None for name, _ in SEEN_TEXT_GROUPS]
            if sum(cell is not None for cell in cells) > 1:
                found.append({"model": model["model"], "heading": heading, "cells": cells})
    return sorted(found, key=lambda row: str(row["heading"]))


def _described(run: Results) -> list[Part]:
    """Return what each evaluation applies to, its versions, and why it gave some models no figure."""
    described: Mapping[str, Part] = run.scorecard.get("evaluations") or {}
    return [
        {"name": name, "kind": one["kind"], "applies_to": one["applies_to"], "absent": one.get("absent", {}),
         "versions": ", ".join(f"{key} {value}" for key, value in (one.get("versions") or {}).items())}
        for name, one in described.items()
    ]  # fmt: skip


def colours(run: Results) -> dict[str, str]:
    """Return a colour for each causal model of the scorecard, cycling through COLOURS."""
    names = [str(model["model"]) for model in run.scorecard.get("models", []) if model.get("kind") == "causal"]
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def made_by(run: Results, stage: str) -> str:
    """Describe how a model was made."""
    name, _, _ = stage.partition("@")
    if name == "align":
        return f"aligned by {run.algorithm(stage) or 'reinforcement learning'}"
    if name == "quantize" and stage in run.packaged.values():
        return "served"
    words = {"pretrain": "pretrained", "finetune": "fine-tuned", "prune": "pruned", "quantize": "exported"}
    return words.get(name, "provided by the user")


def tiles(run: Results) -> list[Part]:
    """Return the figures at the top of the page: those of the served models, and the gains of alignment."""
    models = run.scorecard.get("models", [])
    result: list[Part] = []
    for part, kind, figures in (
        ("chat", "causal", (("exact_match_seen", "exact match, seen entities"),
                            ("exact_match_heldout", "exact match, held-out entities"))),
        ("encoder", "masked", (("masked_names", "masked names, top-1 accuracy"),)),
        ("classifier", "classifier", (("accuracy", "labels, accuracy on held-out texts"),)),
    ):  # fmt: skip
        shown = [model for model in models if model.get("kind") == kind]
        served = [model for model in shown if model.get("made_by") == run.packaged.get(part)] or shown[-1:]
        result += [
            {"kind": "share", "value": model[figure], "label": label, "of": model["model"]}
            for figure, label in figures
            for model in served
            if model.get(figure) is not None
        ]
    return [*result, *_alignment_gains(run, models), *_export_figures(run)]


def _alignment_gains(run: Results, models: Sequence[Part]) -> list[Part]:
    """Return the gain of each alignment, by the judge, else by preference pairs or its reward model."""
    named = {str(model["model"]): model for model in models}
    found: list[Part] = []
    for model in models:
        before = named.get(str(model.get("against")), {})
        if not str(model.get("made_by")).startswith("align@"):
            continue
        if model.get(WIN_RATE) is not None:
            label = f"of replies preferred to those of {model['against']}"
            found.append({"kind": "share", "value": model[WIN_RATE], "label": label, "of": model["model"]})
        elif model.get(IMPLICIT) is not None:
            label = "of held-out preference pairs ordered as people did"
            found.append({"kind": "share", "value": model[IMPLICIT], "label": label, "of": model["model"]})
        elif model.get("reward_mean") is not None and before.get("reward_mean") is not None:
            label = f"rating points gained by {run.algorithm(model['made_by'])}"
            gain = model["reward_mean"] - before["reward_mean"]
            found.append({"kind": "change", "value": gain, "label": label, "of": model["model"]})
    return found


def _export_figures(run: Results) -> list[Part]:
    """Return the size and speed of the packaged chat model."""
    stage = run.packaged.get("chat", "")
    ratio, step = run.metrics(stage).get("ratio"), run.steps.get(stage)
    found: list[Part] = []
    if ratio is not None:
        found.append({"kind": "times", "value": ratio, "label": "of the FP32 file's size", "of": stage})
    if step and "int8_tokens_per_second" in step.log:
        speed, times = step.log["int8_tokens_per_second"], step.log.get("int8_speedup")
        label = f"tokens per second, {times:.1f} × torch in FP32" if times else "tokens per second"
        found.append({"kind": "count", "value": speed, "label": label, "of": stage})
    return found


def _table(
    run: Results, models: Sequence[Part], columns: Sequence[Column],
    differences: Mapping[tuple[str, str], Part],
) -> Part:  # fmt: skip
    columns = [column for column in columns if any(model.get(column[0]) is not None for model in models)]
    named, colour = {str(model["model"]): model for model in models}, colours(run)
    rows = []
    for model in models:
        name, before = str(model["model"]), str(model.get("before") or "")
        cells = [_cell(model, named.get(before, {}), column, differences.get((name, column[0]))) for column in columns]
        rows.append({
            "model": name, "label": made_by(run, str(model.get("made_by"))),
            "before": before if before in named else "",
            "colour": colour.get(name, COLOURS[0]), "cells": cells,
        })  # fmt: skip
    return {"columns": [heading for _, heading, _, _ in columns], "rows": rows}


def _cell(model: Part, before: Part, column: Column, paired: Part | None) -> Part:
    figure, heading, kind, better = column
    value, earlier = model.get(figure), before.get(figure)
    cell: Part = {
        "value": value, "kind": kind, "heading": heading, "interval": model.get(f"{figure}_interval"),
        "spread": model.get("reward_std") if figure == "reward_mean" else None,
        "stderr": model.get(f"{figure}_stderr"), "change": None,
    }  # fmt: skip
    if figure.endswith(WIN_RATE) or value is None or earlier is None or (value == earlier and not paired):
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


def _chart(models: Sequence[Part]) -> Markup:
    groups = []
    for figure, name, colour in (
        ("exact_match_seen", "seen entities", "s1"),
        ("exact_match_heldout", "held-out entities", "s2"),
    ):
        values = [
            Whisker(index, model[figure], *(model.get(f"{figure}_interval") or (model[figure], model[figure])))
            for index, model in enumerate(models)
            if model.get(figure) is not None
        ]
        if values:
            groups.append((name, colour, values))
    if not groups:
        return Markup("")
    return plots.whiskers([str(model["model"]) for model in models], groups, "exact match")
