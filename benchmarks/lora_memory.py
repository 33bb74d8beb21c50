"""Memory of fine-tuning: low-rank updates against all weights, on a model of 135 M parameters.

Run as `make bench-lora_memory` or `python -m benchmarks lora_memory`. Each method loads the same model of
SmolLM2-135M's shape and trains it with AdamW on one conversation of 256 tokens a step, in a process of its own
(`benchmarks/tuning_run.py`), which is asked for the most memory that it held from its start to the saved model.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measured, Row
from tasks.common.settings import read_params

PROFILE = harness.ROOT / "profiles" / "default.yaml"
LENGTH = 256
FULL = "all weights"


def check() -> None:
    """Raise BenchmarkError where something is missing; all that is needed is made here."""


def threads() -> int:
    """Return the threads that a stage computes with."""
    return int(read_params(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measured:
    """Train by either method in turn."""
    rounds, steps = (1, 2) if trial else (3, 5)
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        model = Path(scratch, "model")
        harness.in_process("benchmarks.tuning_run", {"side": "make", "model": str(model)})
        sides = {side: partial(run, side, steps, model, Path(scratch, side)) for side in ("lora", "full")}
        results = harness.alternate(sides, rounds)
    return Measured(rows(results), notes(results, steps))


def run(side: str, steps: int, model: Path, scratch: Path, **numerics: Any) -> Figures:
    """Fine-tune once by a method, some of the profile's numerics changed."""
    params = read_params(PROFILE)
    config = {"steps": steps, "accumulate": 1, "optimizer": params["finetune"]["optimizer"]}
    request: dict[str, Any] = {
        "side": side, "model": str(model), "scratch": str(scratch), "length": LENGTH, "config": config,
        "numerics": params["numerics"] | numerics,
    }  # fmt: skip
    return harness.in_process("benchmarks.tuning_run", request)


def rows(results: dict[str, list[Figures]]) -> list[Row]:
    """Return the medians."""

    def row(what: str, figure: str, unit: str, target: str | None = None) -> Row:
        lora, full = (harness.median(results[side], figure) for side in ("lora", "full"))
        return Row(what, lora, unit, full, FULL, target)

    return [
        row("peak memory of fine-tuning by low-rank updates", "peak_memory_bytes", "bytes", "ratio <= 0.5"),
        row("weights that are trained", "trained_parameters", "parameters"),
        row("a step", "seconds_per_step", "s"),
    ]


def notes(results: dict[str, list[Figures]], steps: int) -> list[str]:
    """Say what was trained, and how far the rounds lie apart."""
    return [
        f"{steps} steps of one conversation of {LENGTH} tokens, AdamW; rank 16 on every linear layer but the head.",
        f"Figures are medians of {len(results['lora'])} rounds in turn.",
        harness.spread(results, "peak_memory_bytes"),
    ]
