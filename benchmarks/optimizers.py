"""Optimizers on one token budget: the held-out loss of each at the best of three learning rates.

Run as `make bench-optimizers` or `python -m benchmarks optimizers`. The default profile's decoder reads the same tokens
in the same order with every optimizer. The batch is small, so that LAMB and AdamW can also run with 8 and 32 times the
batch and still take enough steps. The notes list all rates, to show whether the best one is at the edge.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measurements, Row
from benchmarks.pretrain import PROFILE, check, describe_model, train
from tasks.common.defaults import read_settings

__all__ = ["check"]

BATCH, PARALLEL_RUNS = 8, 2
ADAM: dict[str, Any] = {"betas": [0.9, 0.98], "epsilon": 1e-9}
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {  # specific settings, and learning rates to try
    "sgd": ({"momentum": 0.9, "nesterov": True}, (0.03, 0.1, 0.3)),
    "adam": (ADAM, (1e-3, 3e-3, 1e-2)),
    "adamw": (ADAM, (1e-3, 3e-3, 1e-2)),
    "lamb": (ADAM, (3e-3, 1e-2, 3e-2)),
    "muon": ({**ADAM, "momentum": 0.95}, (1e-3, 3e-3, 1e-2)),
    "lion": ({"betas": [0.9, 0.99]}, (1e-4, 3e-4, 1e-3)),
    "adafactor": ({"threshold": 1.0}, (1e-2, 3e-2, 1e-1)),
}
BATCH_MULTIPLES = {"lamb": (8, 32), "adamw": (8, 32)}
BASELINE = "adamw"


@dataclass(frozen=True)
class Trial:
    """An optimizer with a learning rate and a multiple of BATCH."""

    name: str
    batch_multiple: int
    rate: float

    @property
    def side(self) -> str:
        """The row's label."""
        return f"{self.name}, batch {self.batch_multiple * BATCH}"


def threads() -> int:
    """Return the number of threads of a stage."""
    return int(read_settings(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measurements:
    """Train with every optimizer at every rate, two runs in parallel because they are not timed."""
    steps = 64 if trial else 640
    trials = [
        Trial(name, multiple, rate)
        for name, (_, rates) in OPTIMIZERS.items()
        for multiple in (1, *BATCH_MULTIPLES.get(name, ()))
        for rate in scale_rates(name, rates, multiple)
    ]
    with ThreadPoolExecutor(PARALLEL_RUNS) as pool:
        found = list(pool.map(lambda item: run(item, steps // item.batch_multiple), trials))
    results: dict[str, list[tuple[float, Figures]]] = {}
    for item, figures in zip(trials, found, strict=True):
        results.setdefault(item.side, []).append((item.rate, figures))
    return Measurements(rows(results), notes(results, steps))


def scale_rates(name: str, rates: tuple[float, ...], times: int) -> list[float]:
    """Return the rates for a multiple of the batch; LAMB's scale with its square root (You et al. 2020)."""
    return [rate * math.sqrt(times) if name == "lamb" else rate for rate in rates]


def run(trial: Trial, steps: int) -> Figures:
    """Train once; a diverged run has an infinite loss."""
    params = read_settings(PROFILE)
    config = params["pretrain"]["causal"]
    rule = {"name": trial.name, "learning_rate": trial.rate, "weight_decay": 0.01, "max_grad_norm": 1.0,
            "schedule": config["optimizer"]["schedule"], **OPTIMIZERS[trial.name][0]}  # fmt: skip
    settings = {**config, "batch": trial.batch_multiple * BATCH, "steps": steps, "optimizer": rule}
    try:
        figures = train("ours", settings, params["numerics"])
    except harness.BenchmarkError as error:
        if "is not finite at step" not in str(error):
            raise
        figures = {"heldout_loss": float("inf"), "steps": steps}
    print(f"    {trial.side}, rate {trial.rate:.2g}: {figures['heldout_loss']:.3f}", flush=True)
    return figures


def rows(results: dict[str, list[tuple[float, Figures]]]) -> list[Row]:
    """Return each optimizer's best loss beside AdamW's with BATCH."""
    best = {side: min(figures["heldout_loss"] for _, figures in runs) for side, runs in results.items()}
    baseline = f"{BASELINE}, batch {BATCH}"
    return [Row(f"held-out loss, {side}", loss, "nats/token", best[baseline], baseline) for side, loss in best.items()]


def notes(results: dict[str, list[tuple[float, Figures]]], steps: int) -> list[str]:
    """Return notes on the training, and the loss at each rate."""
    config = read_settings(PROFILE)["pretrain"]["causal"]
    tried = (
        f"{side} ({runs[0][1]['steps']} steps): "
        + ", ".join(f"{figures['heldout_loss']:.3f} at {rate:.2g}" for rate, figures in runs)
        for side, runs in results.items()
    )
    return [
        f"{steps * BATCH * config['window']:,} tokens each, in windows of {config['window']}; {describe_model()}.",
        "One seed each: differences of a few hundredths are not significant.",
        *tried,
    ]
