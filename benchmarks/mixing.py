"""Effect of pretraining text mixed into fine-tuning, by its weight w (`finetune.pretraining_mix.weight`).

Run as `make bench-mixing` or `python -m benchmarks mixing`, in a project where `bessemer run` has finished. For each w
the default profile's decoder is fine-tuned and evaluated: exact match on seen and held-out questions, and perplexity of
held-out prose.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measurements, Row
from benchmarks.pretrain import PROFILE
from tasks.common.defaults import read_settings
from tasks.finetune import stage as finetune

PARALLEL_RUNS = 2
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
REQUIRED_PATHS = (
    "data/pretrain/causal/model", "data/validate/instructions", "data/tokenize/shards", "data/reward/train/model",
    "data/reward/judge/model",
)  # fmt: skip
FIGURES = {
    "exact_match_heldout": ("answers about entities that no question was tuned on", "share right"),
    "exact_match_seen": ("answers to questions tuned on", "share right"),
    "perplexity": ("perplexity of held-out prose", "per token"),
}


def check() -> None:
    """Raise BenchmarkError if the chain's outputs are missing."""
    harness.require_paths(*(harness.ROOT / path for path in REQUIRED_PATHS), remedy="run `bessemer run` first.")


def threads() -> int:
    """Return the number of threads of a stage."""
    return int(read_settings(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measurements:
    """Fine-tune with every weight, two runs in parallel because they are not timed."""
    weights = WEIGHTS[::3] if trial else WEIGHTS
    with ThreadPoolExecutor(PARALLEL_RUNS) as pool:
        found = list(pool.map(lambda weight: run(weight, trial=trial), weights))
    return Measurements(rows(dict(zip(weights, found, strict=True))), notes(trial=trial))


def run(weight: float, *, trial: bool) -> Figures:
    """Fine-tune and evaluate once."""
    params = read_settings(PROFILE)
    tuning: dict[str, Any] = params["finetune"]["chat"]
    tuning["pretraining_mix"]["weight"] = weight
    if trial:
        tuning["steps"] = 20
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        request = {"finetune": tuning, "evaluate": params["evaluate"]["tuned"], "numerics": params["numerics"]}
        figures = harness.run_module("benchmarks.mixing_run", {**request, "scratch": scratch})
    summary = ", ".join(f"{name} {figures[name]}" for name in FIGURES)
    print(f"    w {weight:g}: {summary}", flush=True)
    return figures


def rows(results: dict[float, Figures]) -> list[Row]:
    """Return the figures by weight, beside those without pretraining text."""
    without = results[0.0]
    return [
        Row(f"{what}, w = {weight:g}", figures[name], unit, without[name], "w = 0")
        for name, (what, unit) in FIGURES.items()
        for weight, figures in results.items()
        if weight
    ]


def notes(*, trial: bool) -> list[str]:
    """Return a note on the training."""
    config = finetune.Config.model_validate(read_settings(PROFILE)["finetune"]["chat"])
    steps, mix = 20 if trial else config.steps, config.pretraining_mix
    return [
        f"{steps} steps of {config.batch} conversations and {mix.batch} windows of {mix.window} tokens "
        "(without a weight, none); one seed each.",
    ]
