"""Causal pretraining: our loop against Transformers' `Trainer`, on the same model and tokens with one thread.

Run as `make bench-pretrain` or `python -m benchmarks pretrain`. Both sides use AdamW, because `Trainer` takes one
optimizer. The figures are tokens/s, seconds from process start to the first optimizer step, held-out loss at equal
tokens, and whether a killed and resumed run ends with the same weights as an uninterrupted one. Every run is a
subprocess (`benchmarks/training_run.py`).
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measurements, Row
from tasks.common.defaults import read_settings

PROFILE = harness.ROOT / "profiles" / "default.yaml"
TOKENS = harness.ROOT / "data" / "tokenize"
SIDES = ("ours", "trainer", "trainer-defaults")
SAME_ARITHMETIC_NAME, DEFAULTS_NAME = "Trainer, same arithmetic", "Trainer, its defaults (fp32, SDPA)"
SAME_BYTES_UNIT = "1 = same bytes"


def check() -> None:
    """Raise BenchmarkError if there are no token shards."""
    remedy = "run `bessemer run -s tokenize` first (half a minute)."
    harness.require_paths(TOKENS / "tokenizer", TOKENS / "shards", remedy=remedy)


def threads() -> int:
    """Return the number of threads of a stage."""
    return int(read_settings(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measurements:
    """Train every side in turn, then check that each resumes."""
    rounds, steps, short = (1, 6, 4) if trial else (5, 60, 12)
    results = harness.alternate({side: partial(run, side, steps) for side in SIDES}, rounds)
    resumed = {side: check_resume(side, short) for side in SIDES}
    return Measurements(list(rows(results, resumed)), notes(results, steps))


def run(
    side: str, steps: int, scratch: Path | None = None, *, stop_at: int | None = None, resume: bool = False
) -> Figures:
    """Train once. With a scratch folder it writes checkpoints there, and can be killed at `stop_at` or resumed."""
    params = read_settings(PROFILE)
    numerics: dict[str, Any] = dict(params["numerics"])
    if side == "trainer-defaults":
        numerics |= {"dtype": {"decoder": "float32", "encoder": "float32"}, "attention": "sdpa"}
    return train(side, adamw_settings(steps), numerics, scratch, stop_at=stop_at, resume=resume)


def adamw_settings(steps: int) -> dict[str, Any]:
    """Return the profile's pretraining settings with AdamW and `steps` steps."""
    config = read_settings(PROFILE)["pretrain"]["causal"]
    rule = {name: value for name, value in config["optimizer"].items() if name != "momentum"} | {"name": "adamw"}
    return {**config, "steps": steps, "optimizer": rule}


def train(
    side: str, config: dict[str, Any], numerics: dict[str, Any], scratch: Path | None = None, *,
    stop_at: int | None = None, resume: bool = False,
) -> Figures:  # fmt: skip
    """Run `benchmarks/training_run.py` once on the project's tokens; see `run`."""
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
        scratch_path = {"scratch": str(scratch or fresh)}
        return harness.run_module("benchmarks.training_run", {**request, **scratch_path}, killed=stop_at is not None)


def check_resume(side: str, steps: int) -> bool:
    """Return whether a run killed half-way and resumed ends with the same weights as an uninterrupted one."""
    whole = run(side, steps)
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        run(side, steps, Path(scratch), stop_at=steps // 2 + 1)
        rest = run(side, steps, Path(scratch), resume=True)
    if rest["steps"] >= steps:
        raise harness.BenchmarkError(f"{side} did not resume: it ran all {steps} steps again.")
    same = bool(rest["weights"] == whole["weights"])
    print(f"    {side}: killed and resumed gives {'the same' if same else 'different'} weights", flush=True)
    return same


def rows(results: dict[str, list[Figures]], resumed: dict[str, bool]) -> list[Row]:
    """Return our figures beside those of both trainers."""
    middle = {
        side: {name: harness.median(rounds, name) for name in rounds[0] if name != "weights"}
        for side, rounds in results.items()
    }
    mine, found = middle["ours"], list[Row]()
    for side, name in (("trainer", SAME_ARITHMETIC_NAME), ("trainer-defaults", DEFAULTS_NAME)):
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
                "killed and resumed as uninterrupted", int(resumed["ours"]), SAME_BYTES_UNIT, int(resumed[side]), name,
                target=">= 1",
            ),
        ]  # fmt: skip
    repeats = int(len({figures["weights"] for figures in results["ours"]}) == 1)
    equal = int(results["ours"][0]["weights"] == results["trainer"][0]["weights"])
    return [*found, Row("every run of ours ends with the same weights", repeats, SAME_BYTES_UNIT, target=">= 1"),
            Row("our weights are those of Trainer with the same arithmetic", equal, SAME_BYTES_UNIT)]  # fmt: skip


def notes(results: dict[str, list[Figures]], steps: int) -> list[str]:
    """Return notes on the training and the variation between rounds."""
    return [
        describe_run(steps),
        f"Figures are medians of {len(results['ours'])} rounds in turn.",
        *(
            harness.spread(results, figure)
            for figure in ("tokens_per_second", "tokens_per_cpu_second", "startup_seconds")
        ),
    ]


def describe_run(steps: int) -> str:
    """Return a note on the steps, the batch and the model."""
    config = read_settings(PROFILE)["pretrain"]["causal"]
    return f"{steps} steps of {config['batch']} x {config['window']} tokens; {describe_model()}."


def describe_model() -> str:
    """Return a note on the model."""
    model = read_settings(PROFILE)["pretrain"]["causal"]["model"]
    return "model: " + ", ".join(f"{name} {value}" for name, value in model.items() if name != "path")
