"""A small finished run for tests of the report: every file that the page reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.graph import Stage

RUN = "run-20260102-030405-abcd"
HASH = "0123456789abcdef" * 4
NEEDS: dict[str, tuple[str, ...]] = {
    "ingest": (),
    "validate": ("ingest",),
    "tokenize": ("validate",),
    "pretrain@causal": ("tokenize",),
    "pretrain@masked": ("tokenize",),
    "finetune@chat": ("pretrain@causal", "tokenize"),
    "reward@train": ("pretrain@masked", "validate"),
    "reward@judge": ("pretrain@masked", "validate"),
    "align@policy": ("finetune@chat", "reward@train"),
    "quantize@chat": ("align@policy",),
    "evaluate@tuned": ("finetune@chat", "reward@train", "reward@judge"),
    "evaluate@policy": ("align@policy", "reward@train", "reward@judge"),
    "evaluate@int8": ("quantize@chat", "reward@train", "reward@judge"),
    "evaluate@encoder": ("pretrain@masked",),
    "compare": ("evaluate@tuned", "evaluate@policy", "evaluate@int8", "evaluate@encoder"),
    "package": ("compare", "quantize@chat"),
}
MAKERS = {"tuned": "finetune@chat", "policy": "align@policy", "int8": "quantize@chat", "encoder": "pretrain@masked"}
SETTINGS: dict[str, dict[str, Any]] = {
    "ingest": {"sources": [
        {"name": "countries", "kind": "package", "reader": "countries", "requirement": "countries==1.0"},
        {"name": "stars", "kind": "files", "table": "ratings", "path": "stars.csv"},
    ]},
    "reward@train": {"role": "train", "model": "data/pretrain/masked/model"},
    "reward@judge": {"role": "judge", "model": "data/pretrain/masked/model"},
    "align@policy": {"algorithm": {"name": "ppo", "kl": {"target": 6.0}}},
    "evaluate@tuned": {"questions": 40},
}  # fmt: skip
QUESTION = "What is the capital of France?"


def graph(reasons: Mapping[str, str] | None = None) -> dict[str, Stage]:
    """Return the graph like DVC's, with the reasons why stages are out of date."""
    return {
        name: Stage(
            name, needs, (f"data/{folder(name)}/out",), (reasons[name],) if reasons and name in reasons else (),
            reads=tuple(f"data/{folder(need)}/out" for need in needs),
        )
        for name, needs in NEEDS.items()
    }  # fmt: skip


def folder(stage: str) -> str:
    """Return a stage's folder under data/."""
    return stage.replace("@", "/")


def make(project: Path) -> Path:
    """Write a complete run and return the project's folder."""
    for second, stage in enumerate(NEEDS):
        record = {
            "stage": stage, "recipe": f"{second:02d}{HASH}", "content": HASH, "seed": 1,
            "numerics": {"device": "cpu", "dtype": {"decoder": "bfloat16"}}, "settings": SETTINGS.get(stage, {}),
            "inputs": {},
        }  # fmt: skip
        put(project / "data" / folder(stage) / "record.json", record)
        log(project, RUN, stage, f"{second:02d}{HASH}", f"2026-01-02T03:04:{second:02d}+00:00", 36.0)
    flow = {name: {"status": "ran", "seconds": 36.0, "message": ""} for name in NEEDS}
    put(project / "runs" / RUN / "flow.json", {"run": RUN, "stages": flow})
    (project / "params.yaml").write_text(
        "placement: {max_parallel_stages: 2, cost_per_hour: 0.5, currency: EUR}\n"
        "package: {chat: data/quantize/chat/model}\n",
        encoding="utf-8",
    )
    _data(project)
    _training(project)
    _evaluation(project)
    put(project / "data/package/provenance.json", {"model": "aaaaaaaaaaaa-bbbbbbbbbbbb"})
    return project


def put(path: Path, value: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def log(project: Path, run: str, stage: str, recipe: str, started: str, seconds: float, **more: Any) -> None:
    """Write the log of one stage in one run."""
    speeds: dict[str, dict[str, Any]] = {
        "finetune@chat": {"tokens_per_second": 5000},
        "quantize@chat": {
            "torch_fp32_tokens_per_second": 50, "int8_tokens_per_second": 400.0, "int8_speedup": 8.0,
        },
    }  # fmt: skip
    figures = {
        "stage": stage, "recipe": recipe, "started": started, "seconds": seconds, "peak_memory_bytes": 500_000_000,
        "host": "forge", "machine": "x86_64", "python": "3.11.7", "commit": "c0ffee" * 6, "dirty": False,
    }  # fmt: skip
    put(project / "runs" / run / f"{stage}.json", {**figures, **speeds.get(stage, {}), **more})


def answers(project: Path, model: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the answers of one model."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = ("id", "entity", "split", "kind", "question", "reply", "extracted", "reference")
    schema = pa.schema([*((name, pa.string()) for name in text), ("correct", pa.bool_()), ("reward", pa.float64())])
    path = project / "data" / "evaluate" / model / "answers"
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema), path / "part-00000.parquet")


def answer(name: str, reply: str, **more: Any) -> dict[str, Any]:
    """Return one row of answers."""
    row: dict[str, Any] = {
        "id": name, "entity": f"entity {name}", "split": "train", "kind": "greedy", "question": QUESTION,
        "reply": reply, "extracted": reply, "reference": "Paris", "correct": True, "reward": None,
    }  # fmt: skip
    return {**row, **more}


def toxicity() -> dict[str, Any]:
    """Return the scorecard's section on continuations: eight prompts, two of them threats."""

    def figures(share: float, mean: float) -> dict[str, Any]:
        return {
            "toxicity_mean": mean, "toxicity_mean_interval": [mean - 0.01, mean + 0.01], "toxic_share": share,
            "toxic_share_interval": [share - 0.01, share + 0.01],
        }  # fmt: skip

    change = {"toxic_share": {"change": -0.15, "interval": [-0.2, -0.1]}}
    models = {"tuned": figures(0.25, 0.444), "policy": figures(0.1, 0.222)}
    classifier = {
        "file": "labelled.csv", "sha256": HASH, "trained_on": 80, "heldout": 20, "accuracy": 0.91, "auc": 0.95,
        "majority_class_accuracy": 0.6, "references_toxic": 0.03,
    }  # fmt: skip
    return {"classifier": classifier, "ask": "text", "continuations": 16, "categories": [
        {"category": None, "prompts": 8, "models": models, "changes": {"policy": {"against": "tuned", **change}}},
        {"category": "<b>threat", "prompts": 2, "models": models, "changes": {"policy": {"against": "tuned"}}},
    ]}  # fmt: skip


def _data(project: Path) -> None:
    source = {"licence": "MIT", "sha256": HASH, "read": 1200, "used": 1190, "rejected": 10}
    put(project / "data/ingest/sources.json", [
        {"name": "countries", "kind": "package", **source, "rows": {"corpus": 1000, "instructions": 800}},
        {"name": "stars", "kind": "files", **source, "rows": {"rankings": 70}},
    ])  # fmt: skip
    rejected = {"source": "countries", "row": "Cuba, currency: CUC, CUP", "reason": "several values: two"}
    (project / "data/ingest/rejected.jsonl").write_text(json.dumps(rejected) + "\n", encoding="utf-8")
    put(project / "data/validate/report/validation.json", [{
        "table": "corpus", "read": 1000, "kept": 998, "rejected": 2, "verdicts": [{"success": True}],
        "reasons": [{"reason": "damaged encoding", "count": 2, "examples": ["CuraÃ§ao"]}],
        "sources": [{"source": "countries", "train": 900, "heldout": 98}],
    }])  # fmt: skip
    tokens = {"documents": 900, "tokens": 12345, "bytes_per_token": 3.5}
    put(project / "metrics/tokenize.json", {"vocabulary": 700, "train": tokens, "heldout": tokens, "round_trip": True})


def _training(project: Path) -> None:
    columns = {
        "pretrain@causal": "loss", "pretrain@masked": "loss", "finetune@chat": "task_loss,pretraining_loss",
        "reward@train": "rating_loss,ordering_loss",
        "align@policy": "reward,reward_std,kl,entropy,length,ended,clip_fraction,beta",
    }  # fmt: skip
    for stage, names in columns.items():
        rows = [",".join([str(step), *(f"{0.9 / step:.3f}" for _ in names.split(","))]) for step in (1, 2, 3)]
        path = project / "data" / folder(stage) / "history.csv"
        path.write_text(f"step,{names}\n" + "\n".join(rows) + "\n", encoding="utf-8")
    put(project / "metrics/pretrain@causal.json", {"heldout_loss": 0.75})
    put(project / "metrics/quantize@chat.json", {"bytes": 250, "fp32_bytes": 1000, "ratio": 0.25})
    pairs = {"pairs": 120, "model": 0.81, "bag_of_words": 0.84}
    calibration = [{"predicted": -1.0, "rated": -0.9}, {"predicted": 1.0, "rated": 1.2}]
    length = {"correlation": -0.25, "correlation_of_raters": 0.1, "longer_first": 0.47, "longer_first_by_people": 0.52}
    ranked = {"pairs": 30, "model": 0.625, "bag_of_words": 0.6}
    figures = {"gap_at_least_1": pairs, "ranked_only": ranked, "calibration": calibration, "length": length}
    put(project / "metrics/reward@train.json", {"rankings": 51, **figures})
    put(
        project / "metrics/reward@judge.json",
        {
            "rankings": 21,
            **figures,
            "gap_at_least_1": {"pairs": 120, "model": 0.77},
            "ranked_only": {"pairs": 30, "model": 0.703},
        },
    )


def _evaluation(project: Path) -> None:
    scores = {
        "parameters": 2_000_000, "bytes": 8_000_000, "exact_match_seen": 0.975, "exact_match_heldout": 0.9,
        "exact_match_seen_interval": [0.96, 0.99], "exact_match_heldout_interval": [0.85, 0.95], "perplexity": 20.0,
        "bits_per_byte": 1.75,
        "preference_accuracy": 0.625, "reward_mean": 0.5, "reward_std": 0.9, "distinct_2": 0.4, "answer_loss": 1.234,
        "answer_loss_interval": [1.1, 1.4],
        "abstained_out_of_scope": 0.955, "my_task": {"acc": 0.512, "acc_stderr": 0.0123, "samples": 20},
        "wide": {"bits_per_byte": 1.5}, "by_seen_text": {"exact_match_heldout": {
            "nearly": {"value": 0.95, "items": 60}, "unseen": {"value": 0.75, "items": 12}}},
    }  # fmt: skip
    encoder = {"parameters": 1_000_000, "bytes": 4_000_000, "masked_names": 0.93, "masked_names_interval": [0.9, 0.96]}
    won = {"against": "tuned", "win_rate": 0.715, "win_rate_interval": [0.65, 0.78]}
    ordered = {"implicit_reward_accuracy": 0.645, "implicit_reward_accuracy_interval": [0.55, 0.73]}
    models = [
        {"model": "encoder", "kind": "masked", **encoder},
        {"model": "tuned", **scores},
        {
            "model": "policy", "before": "tuned", **scores, "exact_match_seen": 0.935, "reward_mean": 1.75, **won,
            **ordered,
        },
        {
            "model": "int8", "before": "policy", **scores, "exact_match_seen": 0.935, "bytes": 2_000_000,
            "reward_mean": 1.75,
        },
    ]  # fmt: skip
    models = [{"kind": "causal", "made_by": MAKERS[str(row["model"])], **row} for row in models]
    gates = [
        {"metric": "masked_names", "model": "encoder", "min": 0.9, "value": 0.93, "passed": True},
        {"metric": "reward_mean", "model": "policy", "against": "tuned", "min": 2.0, "value": 1.25, "passed": False},
        {"metric": "chrf", "model": "policy", "min": 0.2, "value": None, "passed": False, "reason": "no conversation"},
    ]
    described = {
        "wide": {"kind": "text", "applies_to": "Models with a corpus.", "absent": {"encoder": "no <corpus>"}},
        "harness": {"kind": "harness", "applies_to": "Any task.", "absent": {}, "versions": {"lm_eval": "0.4.13"}},
    }
    put(project / "metrics/evaluate.json", {"models": models, "gates": gates, "evaluations": described})
    rate = {"from": "tuned", "to": "policy"}
    put(project / "data/compare/differences.json", [
        {**rate, "rate": "exact_match_seen", "change": -0.04, "interval": [-0.06, -0.02]},
        {**rate, "rate": "exact_match_heldout", "change": 0.01, "interval": [-0.01, 0.03]},
        {**rate, "rate": "answer_loss", "change": -0.25, "interval": [-0.5, -0.125]},
    ])  # fmt: skip
    for index, model in enumerate(("tuned", "policy", "int8")):
        answers(project, model, [
            answer("1", "Paris, I think."),
            answer("2", f"held-out reply of {model}", split="heldout"),
            answer("3", f"changing reply of {model}", entity="entity 1", correct=index == 0),
            answer("1", f"sampled reply of {model}", kind="sampled", correct=None, reward=index - 0.5),
        ])  # fmt: skip
    masked = {"kind": "masked", "question": "The capital of [MASK] is Paris.", "reference": "France"}
    answers(project, "encoder", [answer("9", "France", **masked)])
