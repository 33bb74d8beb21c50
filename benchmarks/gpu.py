"""Training on one GPU: speed against a plain compiled loop, model FLOPs utilisation, resume, memory by method.

Run as `make bench-gpu` or `python -m benchmarks gpu`; it needs no data and no network. If `BESSEMER_BENCH_DATA` is set,
it also runs the fine-tuning of `benchmarks/medquad.py` on the GPU. `--trial` without a GPU tests the script on the CPU,
with toy shapes. The peak rate is that of a bfloat16 product of 8,192 x 8,192 matrices.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness, lora_memory, machine, medquad
from benchmarks.harness import BenchmarkError, Figures, Measurements, Row
from benchmarks.pretrain import PROFILE, adamw_settings, threads
from tasks.common.defaults import read_settings

__all__ = ["threads"]

METHODS = ("qlora", "lora", "full")
PLAIN_NAME = "a plain compiled loop"
FIGURES = ("tokens_per_second", "flops_per_second", "ceiling", "memory_bytes")


@dataclass(frozen=True)
class Size:
    """Model shapes by name, and how long each is trained."""

    shapes: dict[str, dict[str, int]]
    vocabulary: int
    window: int
    batch: int  # windows per step
    steps: int


FULL_SIZE = Size(  # GPT-2's widths and depths with Llama's layers: 124 M and 354 M parameters
    {
        "125 M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
        "350 M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    },
    vocabulary=50304, window=1024, batch=32, steps=60,
)  # fmt: skip
TOY_SIZE = Size(
    {"toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}},
    vocabulary=512, window=64, batch=2, steps=12,
)  # fmt: skip


def check() -> None:
    """Check nothing: `measure` checks for a GPU, because a trial needs none."""


def measure(*, trial: bool) -> Measurements:
    """Train each shape on both sides in turn, then fine-tune by each method."""
    gpu = machine.has_gpu()
    if not gpu and not trial:
        raise BenchmarkError("torch finds no GPU: use a machine with one, or test the script with --trial.")
    size = FULL_SIZE if gpu else TOY_SIZE
    measured = Measurements(notes=[f"{size.batch} windows of {size.window} tokens a step, AdamW."])
    device = "cuda" if gpu else "cpu"
    measured.rows.append(resume_row(device))
    for name, shape in size.shapes.items():
        sides = {side: partial(train, side, shape, size, device) for side in ("ours", "plain")}
        results = harness.alternate(sides, 1 if trial else 2)
        measured.rows += speed_rows(name, results)
        measured.notes.append(f"{name}: {harness.spread(results, 'tokens_per_second')}")
    if gpu:
        measured.rows += memory_rows()
        if medquad.DATA_VARIABLE in os.environ:
            tuned = medquad.measure(trial=trial)
            measured.rows += tuned.rows
            measured.notes += tuned.notes
    return measured


def train(side: str, shape: dict[str, int], size: Size, device: str) -> Figures:
    """Do one compiled run of `benchmarks/gpu_run.py`."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        return run(side, shape, size, device, scratch, compile="always")


def run(
    side: str, shape: dict[str, int], size: Size, device: str, scratch: str, *, compile: str, stop_at: int | None = None
) -> Figures:
    """Do one run, or resume the one in the same scratch folder; with `stop_at` it is killed at that step."""
    numerics = read_settings(PROFILE)["numerics"] | {"device": device, "attention": "sdpa", "compile": compile}
    config = adamw_settings(size.steps) | {"window": size.window, "batch": size.batch}
    config["optimizer"]["learning_rate"] = 3e-4
    rest = {"vocab_size": size.vocabulary, "tie_word_embeddings": True, "max_position_embeddings": size.window}
    request = {"side": side, "shape": {**shape, **rest}, "scratch": scratch, "config": config, "numerics": numerics}
    request |= {"stop_at": stop_at, "checkpoint_seconds": 1e9 if compile == "always" else 1e-9}
    return harness.run_module("benchmarks.gpu_run", request, killed=stop_at is not None)


def resume_row(device: str) -> Row:
    """Train without interruption, and killed half-way and resumed; return whether the weights are equal."""
    train_toy = partial(run, "ours", TOY_SIZE.shapes["toy"], TOY_SIZE, device, compile="never")
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        whole = train_toy(str(Path(scratch, "whole")))
        train_toy(str(Path(scratch, "killed")), stop_at=TOY_SIZE.steps // 2)
        resumed = train_toy(str(Path(scratch, "killed")))
    same = resumed["weights"] == whole["weights"] and resumed["steps"] < whole["steps"]
    return Row("killed and resumed as uninterrupted", int(same), "1 = same bytes", target=">= 1")


def speed_rows(name: str, results: dict[str, list[Figures]]) -> Iterator[Row]:
    """Yield a shape's rows: speed and memory beside the plain loop's, and the model FLOPs utilisation."""
    mine, other = ({figure: harness.median(results[side], figure) for figure in FIGURES} for side in ("ours", "plain"))
    yield Row(f"training speed, {name}", mine["tokens_per_second"], "tokens/s", other["tokens_per_second"], PLAIN_NAME)
    yield Row(f"peak memory, {name}", mine["memory_bytes"], "bytes", other["memory_bytes"], PLAIN_NAME)
    yield Row(f"the ceiling, {name}", mine["ceiling"] / 1e12, "TFLOP/s")
    share = mine["flops_per_second"] / mine["ceiling"]
    yield Row(f"model FLOPs utilisation, {name}", share, "of the ceiling", target=">= 0.45")


def memory_rows() -> Iterator[Row]:
    """Yield the memory of LoRA and QLoRA beside that of full fine-tuning."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        model = Path(scratch, "model")
        harness.run_module("benchmarks.tuning_run", {"side": "make", "model": str(model)})
        numerics: dict[str, Any] = {"device": "cuda", "attention": "sdpa"}
        found = {side: lora_memory.run(side, 5, model, Path(scratch, side), **numerics) for side in METHODS}
    full = found["full"]
    for side in METHODS[:-1]:
        memory = found[side]["peak_memory_bytes"]
        target = "ratio <= 0.5"
        yield Row(f"peak memory, {side}", memory, "bytes", full["peak_memory_bytes"], lora_memory.FULL_NAME, target)
        yield Row(
            f"a step, {side}", found[side]["seconds_per_step"], "s", full["seconds_per_step"], lora_memory.FULL_NAME
        )
