"""Optimizers by name on one token budget: the loss that each reaches at the best of three learning rates.

Run as `make bench-optimizers` or `python -m benchmarks optimizers`. The default profile's decoder reads the same tokens
in the same order whoever trains it. The batch is small, so that LAMB (and AdamW beside it) can have 8 and 32 times as
large a one and still take steps; the rates tried are in the notes, so that a best one at the edge can be seen.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measured, Row
from benchmarks.pretrain import PROFILE, check, shape, train
from tasks.common.settings import read_params

__all__ = ["check"]

BATCH, SIDE_BY_SIDE = 8, 2
ADAM: dict[str, Any] = {"betas": [0.9, 0.98], "epsilon": 1e-9}
RULES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {  # what each is told beside the rest, and rates to try
    "sgd": ({"momentum": 0.9, "nesterov": True}, (0.03, 0.1, 0.3)),
    "adam": (ADAM, (1e-3, 3e-3, 1e-2)),
    "adamw": (ADAM, (1e-3, 3e-3, 1e-2)),
    "lamb": (ADAM, (3e-3, 1e-2, 3e-2)),
    "muon": ({**ADAM, "momentum": 0.95}, (1e-3, 3e-3, 1e-2)),
    "lion": ({"betas": [0.9, 0.99]}, (1e-4, 3e-4, 1e-3)),
    "adafactor": ({"threshold": 1.0}, (1e-2, 3e-2, 1e-1)),
}
LARGE = {"lamb": (8, 32), "adamw": (8, 32)}
BASELINE = "adamw"


@dataclass(frozen=True)
class Trial:
    """An optimizer at a rate and a batch of so many times the size."""

    name: str
    times: int
    rate: float

    @property
    def side(self) -> str:
        """What the row is called."""
        return f"{self.name}, batch {self.times * BATCH}"


def threads() -> int:
    """Return the threads that a stage computes with."""
    return int(read_params(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measured:
    """Train with every optimizer at every rate, two at a time: nothing here is timed."""
    steps = 64 if trial else 640
    trials = [Trial(name, times, rate) for name, (_, rates) in RULES.items() for times in (1, *LARGE.get(name, ()))
              for rate in scaled(name, rates, times)]  # fmt: skip
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = list(pool.map(lambda item: run(item, steps // item.times), trials))
    results: dict[str, list[tuple[float, Figures]]] = {}
    for item, figures in zip(trials, found, strict=True):
        results.setdefault(item.side, []).append((item.rate, figures))
    return Measured(rows(results), notes(results, steps))


def scaled(name: str, rates: tuple[float, ...], times: int) -> list[float]:
    """Return the rates to try at so many times the batch; LAMB's grow with its root (You et al. 2020)."""
    return [rate * math.sqrt(times) if name == "lamb" else rate for rate in rates]


def run(trial: Trial, steps: int) -> Figures:
    """Do one run of so many steps."""
    params = read_params(PROFILE)
    config = params["pretrain"]["clm"]
    rule = {"name": trial.name, "learning_rate": trial.rate, "weight_decay": 0.01, "clip": 1.0,
            "schedule": config["optimizer"]["schedule"], **RULES[trial.name][0]}  # fmt: skip
    settings = {**config, "batch": trial.times * BATCH, "steps": steps, "optimizer": rule}
    try:
        figures = train("ours", settings, params["numerics"])
    except harness.BenchmarkError as error:
        if "no longer a finite number" not in str(error):
            raise
        figures = {"heldout_loss": float("inf"), "steps": steps}
    print(f"    {trial.side}, rate {trial.rate:.2g}: {figures['heldout_loss']:.3f}", flush=True)
    return figures


def rows(results: dict[str, list[tuple[float, Figures]]]) -> list[Row]:
    """Return each optimizer's best loss beside AdamW's at the usual batch."""
    best = {side: min(figures["heldout_loss"] for _, figures in tried) for side, tried in results.items()}
    usual = f"{BASELINE}, batch {BATCH}"
    return [Row(f"held-out loss, {side}", loss, "nats/token", best[usual], usual) for side, loss in best.items()]


def notes(results: dict[str, list[tuple[float, Figures]]], steps: int) -> list[str]:
    """Say what was trained, and what each rate reached."""
    config = read_params(PROFILE)["pretrain"]["clm"]
    tried = (
        f"{side} ({runs[0][1]['steps']} steps): "
        + ", ".join(f"{figures['heldout_loss']:.3f} at {rate:.2g}" for rate, figures in runs)
        for side, runs in results.items()
    )
    return [
        f"{steps * BATCH * config['window']:,} tokens each, in windows of {config['window']}; {shape()}.",
        "One seed each: differences of some hundredths say nothing.",
        *tried,
    ]
