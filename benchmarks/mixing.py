"""What pretraining text mixed into fine-tuning saves: a curve over its weight w (`finetune.mix.weight`).

Run as `make bench-mixing` or `python -m benchmarks mixing`, in a project in which `bessemer run` is through. The
default profile's decoder is tuned anew for each w and then asked what it was tuned on, what it was never asked in
training, and for the perplexity of held-out prose.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measured, Row
from benchmarks.pretrain import PROFILE
from tasks import finetune
from tasks.common.settings import read_params

SIDE_BY_SIDE = 2
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
NEEDED = (
    "data/pretrain/clm/model", "data/validate/instructions", "data/tokenize/shards", "data/reward/policy/model",
    "data/reward/judge/model",
)  # fmt: skip
FIGURES = {
    "exact_match_heldout": ("answers about entities that no question was tuned on", "share right"),
    "exact_match_tuned": ("answers to questions tuned on", "share right"),
    "perplexity": ("perplexity of held-out prose", "per token"),
}


def check() -> None:
    """Raise BenchmarkError where the chain has not come so far."""
    harness.needed(*(harness.ROOT / path for path in NEEDED), remedy="run `bessemer run` first.")


def threads() -> int:
    """Return the threads that a stage computes with."""
    return int(read_params(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measured:
    """Tune with every weight, two at a time: nothing here is timed."""
    weights = WEIGHTS[::3] if trial else WEIGHTS
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = list(pool.map(lambda weight: run(weight, trial=trial), weights))
    return Measured(rows(dict(zip(weights, found, strict=True))), notes(trial=trial))


def run(weight: float, *, trial: bool) -> Figures:
    """Tune and evaluate once."""
    params = read_params(PROFILE)
    tuning: dict[str, Any] = params["finetune"]
    tuning["mix"]["weight"] = weight
    if trial:
        tuning["steps"] = 20
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        request = {"finetune": tuning, "evaluate": params["evaluate"], "numerics": params["numerics"]}
        figures = harness.in_process("benchmarks.mixing_run", {**request, "scratch": scratch})
    told = ", ".join(f"{name} {figures[name]}" for name in FIGURES)
    print(f"    w {weight:g}: {told}", flush=True)
    return figures


def rows(results: dict[float, Figures]) -> list[Row]:
    """Return the curve, each point beside what is reached without pretraining text."""
    without = results[0.0]
    return [
        Row(f"{what}, w = {weight:g}", figures[name], unit, without[name], "w = 0")
        for name, (what, unit) in FIGURES.items()
        for weight, figures in results.items()
        if weight
    ]


def notes(*, trial: bool) -> list[str]:
    """Say what was trained."""
    config = finetune.Config.model_validate(read_params(PROFILE)["finetune"])
    steps = 20 if trial else config.steps
    return [
        f"{steps} steps of {config.batch} conversations and {config.mix.batch} windows of {config.mix.window} tokens "
        "(without a weight, none); one seed each.",
    ]
