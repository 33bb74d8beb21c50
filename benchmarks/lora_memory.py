"""Peak memory of fine-tuning: LoRA against full fine-tuning, on a model of 135 M parameters.

Run as `make bench-lora_memory` or `python -m benchmarks lora_memory`. Each method loads the same model of
SmolLM2-135M's shape and trains it with AdamW on one conversation of 256 tokens per step, in a subprocess
(`benchmarks/tuning_run.py`) that reports its peak memory from the start to the saved model.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measurements, Row
from tasks.common.defaults import read_settings

PROFILE = harness.ROOT / "profiles" / "default.yaml"
SEQUENCE_TOKENS = 256
FULL_NAME = "all weights"


def check() -> None:
    """Check nothing: the benchmark creates everything that it needs."""


def threads() -> int:
    """Return the number of threads of a stage."""
    return int(read_settings(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measurements:
    """Train with both methods in turn."""
    rounds, steps = (1, 2) if trial else (3, 5)
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        model = Path(scratch, "model")
        harness.run_module("benchmarks.tuning_run", {"side": "make", "model": str(model)})
        sides = {side: partial(run, side, steps, model, Path(scratch, side)) for side in ("lora", "full")}
        results = harness.alternate(sides, rounds)
    return Measurements(rows(results), notes(results, steps))


def run(side: str, steps: int, model: Path, scratch: Path, **numerics: Any) -> Figures:
    """Fine-tune once with a method; `numerics` overrides the profile's."""
    params = read_settings(PROFILE)
    config = {"steps": steps, "gradient_accumulation_steps": 1, "optimizer": params["finetune"]["chat"]["optimizer"]}
    request: dict[str, Any] = {
        "side": side, "model": str(model), "scratch": str(scratch), "length": SEQUENCE_TOKENS, "config": config,
        "numerics": params["numerics"] | numerics,
    }  # fmt: skip
    return harness.run_module("benchmarks.tuning_run", request)


def rows(results: dict[str, list[Figures]]) -> list[Row]:
    """Return the medians."""

    def row(what: str, figure: str, unit: str, target: str | None = None) -> Row:
        lora, full = (harness.median(results[side], figure) for side in ("lora", "full"))
        return Row(what, lora, unit, full, FULL_NAME, target)

    return [
        row("peak memory of fine-tuning by low-rank updates", "peak_memory_bytes", "bytes", "ratio <= 0.5"),
        row("weights that are trained", "trained_parameters", "parameters"),
        row("a step", "seconds_per_step", "s"),
    ]


def notes(results: dict[str, list[Figures]], steps: int) -> list[str]:
    """Return notes on the training and the variation between rounds."""
    return [
        f"{steps} steps of one conversation of {SEQUENCE_TOKENS} tokens, AdamW; "
        "rank 16 on all linear layers except the head.",
        f"Figures are medians of {len(results['lora'])} rounds in turn.",
        harness.spread(results, "peak_memory_bytes"),
    ]
