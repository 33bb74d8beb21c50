"""Speed of causal pretraining on two cores: against `Trainer`, a plain bf16 loop, and the machine's peak rate.

Run as `make bench-speed` or `python -m benchmarks speed`. Every side is one process with two threads; ours is compiled
(`numerics: {threads: 2, compile: always}`). All sides use AdamW; the profile's Muon has separate rows. The peak rate
("ceiling") is the median rate of a step's matrix products, forward and backward, at the model's shapes and with the
same threads (`benchmarks/shapes_run.py`). It is measured in every round, because a machine's speed drifts. The share of
the peak rate is measured with the profile's step of 2,048 tokens, and with one of 8,192 (eight sequences, like
`Trainer`'s batch, of 1,024), where the fixed cost of a step matters less. Another row has the rate of the same products
with contiguous operands.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measurements, Row
from benchmarks.pretrain import PROFILE, adamw_settings, check, describe_run, train
from tasks.common.defaults import read_settings

__all__ = ["check"]

THREADS = 2
PEERS = {  # side: label, target speedup of ours
    "trainer-defaults": ("Trainer, its defaults (fp32, SDPA)", 2.5),
    "plain": ("a plain bf16 loop", 1.3),
    "plain-compiled": ("a plain bf16 loop, compiled", 1.0),
}
OUR_SIDES = ("ours", "ours-eager", "ours-muon", "ours-large")
CEILING_TARGET = "ratio >= 0.75"  # of the peak rate
LARGE_STEP_FACTOR = 4  # multiple of the profile's batch


def threads() -> int:
    """Return the number of threads of all sides."""
    return THREADS


def measure(*, trial: bool) -> Measurements:
    """Measure the peak rates and train every side, in turn."""
    rounds, steps = (1, 12) if trial else (3, 150)
    sides = {side: partial(run, side, steps) for side in (*OUR_SIDES, *PEERS)}
    ceilings: dict[str, Callable[[], Figures]] = {
        "ceiling": ceiling,
        "ceiling-large": partial(ceiling, LARGE_STEP_FACTOR),
    }
    results = harness.alternate({**ceilings, **sides}, rounds)
    highest = {name: results.pop(name) for name in ceilings}
    return Measurements(list(rows(results, highest)), notes(results, steps))


def run(side: str, steps: int) -> Figures:
    """Train one side once."""
    params = read_settings(PROFILE)
    ours = side in OUR_SIDES
    numerics: dict[str, Any] = {**params["numerics"], "threads": THREADS, "attention": "eager" if ours else "sdpa"}
    if ours:
        numerics["compile"] = "never" if side == "ours-eager" else "always"
    if side == "trainer-defaults":
        numerics |= {"dtype": {"decoder": "float32", "encoder": "float32"}}
    config = {**params["pretrain"]["causal"], "steps": steps} if side == "ours-muon" else adamw_settings(steps)
    if side == "ours-large":
        config |= {"batch": LARGE_STEP_FACTOR * config["batch"], "steps": max(steps // LARGE_STEP_FACTOR, 8)}
    return train("ours" if ours else side, config, numerics)


def ceiling(batch_factor: int = 1) -> Figures:
    """Return the GFLOP/s of a step's products at a multiple of the batch, as they are and with contiguous operands."""
    params = read_settings(PROFILE)
    request = {name: params["pretrain"]["causal"][name] for name in ("model", "window", "batch")}
    request["batch"] *= batch_factor
    request["vocabulary"] = params["tokenize"]["tokenizer"]["vocabulary"]
    request["numerics"] = {**params["numerics"], "threads": THREADS}
    return harness.run_module("benchmarks.shapes_run", request)


def rows(results: dict[str, list[Figures]], ceilings: dict[str, list[Figures]]) -> list[Row]:
    """Return our figures beside the peers' and the peak rates."""
    middle = {
        side: {name: harness.median(rounds, name) for name in ("tokens_per_second", "heldout_loss", "startup_seconds")}
        for side, rounds in results.items()
    }
    mine, found = middle["ours"], list[Row]()
    for side, (name, times) in PEERS.items():
        other = middle[side]
        found += [
            Row("training speed", mine["tokens_per_second"], "tokens/s", other["tokens_per_second"], name,
                f"ratio >= {times}"),
            Row("held-out loss at equal tokens", mine["heldout_loss"], "nats/token", other["heldout_loss"], name,
                "ratio <= 1"),
            Row("process start to first step", mine["startup_seconds"], "s", other["startup_seconds"], name),
        ]  # fmt: skip
    eager, flops = middle["ours-eager"]["tokens_per_second"], results["ours"][0]["flops_per_token"]
    muon = middle["ours-muon"]
    large = middle["ours-large"]["tokens_per_second"] * flops / 1e9
    return [
        *found,
        Row("training speed, compiled", mine["tokens_per_second"], "tokens/s", eager, "ours, not compiled"),
        Row("training speed by Muon", muon["tokens_per_second"], "tokens/s", mine["tokens_per_second"],
            "ours by AdamW"),
        Row("held-out loss by Muon", muon["heldout_loss"], "nats/token", mine["heldout_loss"], "ours by AdamW"),
        Row("model FLOP/s", mine["tokens_per_second"] * flops / 1e9, "GFLOP/s",
            harness.median(ceilings["ceiling"], "gflops"), "the median product of a step", CEILING_TARGET),
        Row("model FLOP/s, large step", large, "GFLOP/s", harness.median(ceilings["ceiling-large"], "gflops"),
            "the median product of a step", CEILING_TARGET),
        Row("model FLOP/s, large step", large, "GFLOP/s", harness.median(ceilings["ceiling-large"], "straight_gflops"),
            "the same with all operands straight"),
    ]  # fmt: skip


def notes(results: dict[str, list[Figures]], steps: int) -> list[str]:
    """Return notes on the training and the variation between rounds."""
    return [
        describe_run(steps),
        f"Figures are medians of {len(results['ours'])} rounds in turn; compiler caches were warm after the first.",
        f"A large step has {LARGE_STEP_FACTOR} times the batch, for about as many tokens.",
        "Model FLOPs are PaLM's formula (tasks/common/training/flops.py); a ceiling is the median of as many rounds.",
        harness.spread(results, "tokens_per_second"),
    ]
