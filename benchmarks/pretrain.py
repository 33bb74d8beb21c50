"""Causal pretraining: our loop against Transformers' `Trainer`, on one model, the same tokens and one thread.

Run as `make bench-pretrain` or `python -m benchmarks pretrain`. Both sides have AdamW, because `Trainer` takes one
optimizer. Measured are tokens/s, seconds from the start of the process to its first optimizer step, the loss on
held-out text after equal tokens, and whether a run that was killed and resumed ends with the bytes of one that was
not. Every run is a process of its own (`benchmarks/training_run.py`).
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measured, Row
from tasks.common.settings import read_params

PROFILE = harness.ROOT / "profiles" / "default.yaml"
TOKENS = harness.ROOT / "data" / "tokenize"
SIDES = ("ours", "trainer", "trainer-defaults")
LIKE, DEFAULTS = "Trainer, same arithmetic", "Trainer, its defaults (fp32, SDPA)"
SAME = "1 = same bytes"


def check() -> None:
    """Raise BenchmarkError where there are no tokens to read."""
    remedy = "run `bessemer run -s tokenize` first (half a minute)."
    harness.needed(TOKENS / "tokenizer", TOKENS / "shards", remedy=remedy)


def threads() -> int:
    """Return the threads that a stage computes with."""
    return int(read_params(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measured:
    """Train on every side in turn, then interrupt each and resume it."""
    rounds, steps, short = (1, 6, 4) if trial else (5, 60, 12)
    results = harness.alternate({side: partial(run, side, steps) for side in SIDES}, rounds)
    resumed = {side: resumes(side, short) for side in SIDES}
    return Measured(list(rows(results, resumed)), notes(results, steps))


def run(
    side: str, steps: int, scratch: Path | None = None, *, stop_at: int | None = None, resume: bool = False
) -> Figures:
    """Do one run; with a scratch folder it keeps checkpoints there and can be killed at a step or resumed."""
    params = read_params(PROFILE)
    numerics: dict[str, Any] = dict(params["numerics"])
    if side == "trainer-defaults":
        numerics |= {"dtype": {"decoder": "float32", "encoder": "float32"}, "attention": "sdpa"}
    return train(side, by_adamw(steps), numerics, scratch, stop_at=stop_at, resume=resume)


def by_adamw(steps: int) -> dict[str, Any]:
    """Return the profile's settings for so many steps, with the optimizer that every side has."""
    config = read_params(PROFILE)["pretrain"]["clm"]
    rule = {name: value for name, value in config["optimizer"].items() if name != "momentum"} | {"name": "adamw"}
    return {**config, "steps": steps, "optimizer": rule}


def train(
    side: str, config: dict[str, Any], numerics: dict[str, Any], scratch: Path | None = None, *,
    stop_at: int | None = None, resume: bool = False,
) -> Figures:  # fmt: skip
    """Do one run of `benchmarks/training_run.py` on the project's tokens; see `run`."""
    request = {
        "side": side,
        "config": config,
        "numerics": numerics,
        "tokens": str(TOKENS),
        "checkpoints": scratch is not None,
        "stop_at": stop_at,
        "resume": resume,
    }
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as fresh:
        place = {"scratch": str(scratch or fresh)}
        return harness.in_process("benchmarks.training_run", {**request, **place}, killed=stop_at is not None)


def resumes(side: str, steps: int) -> bool:
    """Return whether a run that was killed half-way and resumed ends with the bytes of one that ran through."""
    whole = run(side, steps)
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        run(side, steps, Path(scratch), stop_at=steps // 2 + 1)
        rest = run(side, steps, Path(scratch), resume=True)
    if rest["steps"] >= steps:
        raise harness.BenchmarkError(f"{side} did not resume: it did all {steps} steps again.")
    same = bool(rest["weights"] == whole["weights"])
    print(f"    {side}: killed and resumed gives {'the same' if same else 'other'} bytes", flush=True)
    return same


def rows(results: dict[str, list[Figures]], resumed: dict[str, bool]) -> list[Row]:
    """Return the figures of our loop beside those of both trainers."""
    middle = {
        side: {name: harness.median(rounds, name) for name in rounds[0] if name != "weights"}
        for side, rounds in results.items()
    }
    mine, found = middle["ours"], list[Row]()
    for side, name in (("trainer", LIKE), ("trainer-defaults", DEFAULTS)):
        other = middle[side]
        found += [
            Row("training speed", mine["tokens_per_second"], "tokens/s", other["tokens_per_second"], name),
            Row("training speed by processor time", mine["tokens_per_cpu_second"], "tokens/s",
                other["tokens_per_cpu_second"], name),
            Row("process start to first step", mine["startup_seconds"], "s", other["startup_seconds"], name),
            Row("process start to first step, processor time", mine["startup_cpu_seconds"], "s",
                other["startup_cpu_seconds"], name),
            Row("held-out loss at equal tokens", mine["heldout_loss"], "nats/token", other["heldout_loss"], name),
            Row("peak memory", int(mine["peak_memory_bytes"]), "bytes", int(other["peak_memory_bytes"]), name),
            Row(
                "killed and resumed as uninterrupted", int(resumed["ours"]), SAME, int(resumed[side]), name,
                target=">= 1",
            ),
        ]  # fmt: skip
    repeats = int(len({figures["weights"] for figures in results["ours"]}) == 1)
    equal = int(results["ours"][0]["weights"] == results["trainer"][0]["weights"])
    return [*found, Row("every run of ours ends with the same weights", repeats, SAME, target=">= 1"),
            Row("our weights are those of Trainer with the same arithmetic", equal, SAME)]  # fmt: skip


def notes(results: dict[str, list[Figures]], steps: int) -> list[str]:
    """Say what was trained, and how far the rounds lie apart."""
    return [
        trained(steps),
        f"Figures are medians of {len(results['ours'])} rounds in turn.",
        *(
            harness.spread(results, figure)
            for figure in ("tokens_per_second", "tokens_per_cpu_second", "startup_seconds")
        ),
    ]


def trained(steps: int) -> str:
    """Say how long what was trained."""
    config = read_params(PROFILE)["pretrain"]["clm"]
    return f"{steps} steps of {config['batch']} x {config['window']} tokens; {shape()}."


def shape() -> str:
    """Say what model was trained."""
    model = read_params(PROFILE)["pretrain"]["clm"]["model"]
    return "model: " + ", ".join(f"{name} {value}" for name, value in model.items() if name != "path")
