"""Causal pretraining at full speed on two cores: against `Trainer`, a plain bf16 loop, and the machine's own rate.

Run as `make bench-speed` or `python -m benchmarks speed`. Every side is one process of two threads; ours is compiled
(`numerics: {threads: 2, compile: always}`). All have AdamW; the profile's own Muon stands in rows by itself. The
ceiling is the median rate of the matrix products of a step, forward and backward, at the model's own shapes and by as
many threads (`benchmarks/shapes_run.py`); it takes its turn in every round, since a machine's speed drifts. The share
of it is measured twice: on the profile's own step of 2,048 tokens, which learns most from few tokens, and on one of
8,192 (eight sequences, as `Trainer`'s batch has, of 1,024), where what a step costs once, whatever its size, counts
little. Beside the ceiling stands the rate of the same products with all operands straight.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measured, Row
from benchmarks.pretrain import PROFILE, by_adamw, check, train, trained
from tasks.common.settings import read_params

__all__ = ["check"]

CORES = 2
PEERS = {  # side: what it is called, and by how much ours is to be faster
    "trainer-defaults": ("Trainer, its defaults (fp32, SDPA)", 2.5),
    "plain": ("a plain bf16 loop", 1.3),
    "plain-compiled": ("a plain bf16 loop, compiled", 1.0),
}
OURS = ("ours", "ours-eager", "ours-muon", "ours-large")
SHARE = "ratio >= 0.75"  # of the ceiling
LARGE = 4  # times the profile's batch


def threads() -> int:
    """Return the threads that all sides compute with."""
    return CORES


def measure(*, trial: bool) -> Measured:
    """Measure the ceiling and train on every side, in turn."""
    rounds, steps = (1, 12) if trial else (3, 150)
    sides = {side: partial(run, side, steps) for side in (*OURS, *PEERS)}
    ceilings: dict[str, Callable[[], Figures]] = {"ceiling": ceiling, "ceiling-large": partial(ceiling, LARGE)}
    results = harness.alternate({**ceilings, **sides}, rounds)
    highest = {name: results.pop(name) for name in ceilings}
    return Measured(list(rows(results, highest)), notes(results, steps))


def run(side: str, steps: int) -> Figures:
    """Do one run."""
    params = read_params(PROFILE)
    ours = side in OURS
    numerics: dict[str, Any] = {**params["numerics"], "threads": CORES, "attention": "eager" if ours else "sdpa"}
    if ours:
        numerics["compile"] = "never" if side == "ours-eager" else "always"
    if side == "trainer-defaults":
        numerics |= {"dtype": {"decoder": "float32", "encoder": "float32"}}
    config = {**params["pretrain"]["clm"], "steps": steps} if side == "ours-muon" else by_adamw(steps)
    if side == "ours-large":
        config |= {"batch": LARGE * config["batch"], "steps": max(steps // LARGE, 8)}
    return train("ours" if ours else side, config, numerics)


def ceiling(times: int = 1) -> Figures:
    """Return the GFLOP/s of products of a step, as it has them and straight, by all cores; at times the batch."""
    params = read_params(PROFILE)
    request = {name: params["pretrain"]["clm"][name] for name in ("model", "window", "batch")}
    request["batch"] *= times
    request["vocabulary"] = params["tokenize"]["tokenizer"]["vocabulary"]
    request["numerics"] = {**params["numerics"], "threads": CORES}
    return harness.in_process("benchmarks.shapes_run", request)


def rows(results: dict[str, list[Figures]], ceilings: dict[str, list[Figures]]) -> list[Row]:
    """Return our figures beside the peers' and the ceilings'."""
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
            harness.median(ceilings["ceiling"], "gflops"), "the median product of a step", SHARE),
        Row("model FLOP/s, large step", large, "GFLOP/s", harness.median(ceilings["ceiling-large"], "gflops"),
            "the median product of a step", SHARE),
        Row("model FLOP/s, large step", large, "GFLOP/s", harness.median(ceilings["ceiling-large"], "straight_gflops"),
            "the same with all operands straight"),
    ]  # fmt: skip


def notes(results: dict[str, list[Figures]], steps: int) -> list[str]:
    """Say what was trained, and how far the rounds lie apart."""
    return [
        trained(steps),
        f"Figures are medians of {len(results['ours'])} rounds in turn; compilers' caches were warm after the first.",
        f"A large step has {LARGE} times the batch, for about as many tokens.",
        "Model FLOPs are PaLM's formula (tasks/common/training/flops.py); a ceiling is the median of as many rounds.",
        harness.spread(results, "tokens_per_second"),
    ]
