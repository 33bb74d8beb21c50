"""When to use torch.compile, and what it needs (`numerics.compile`).

Compiling takes 10–60 s before the first step and then saves a fifth of each step on a CPU (benchmarks/LOG.md), more on
a GPU. So `auto` compiles runs that would take about five minutes or more without it. The estimate uses the model FLOPs
of the whole run and not measured time: the choice affects the bytes of a result, so it must be the same on every
machine.
"""

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError
from tasks.common.overrides import rotary
from tasks.common.settings import Numerics

if TYPE_CHECKING:
    import torch

# Model FLOPs of about five uncompiled minutes on one thread or one GPU: 110 GFLOP/s in bfloat16 on a thread of an AMD
# EPYC (Zen 4), 300 TFLOP/s on an H100.
WORTHWHILE_FLOPS = {"cpu": 3e13, "cuda": 1e17}
COMPILERS = ("g++", "clang++", "c++")


def should_compile(numerics: Numerics, flops: float | None) -> bool:
    """Return whether to compile a run of `flops` model FLOPs (None: unknown).

    Raises StageError if it should be compiled and there is no C++ compiler.
    """
    workers = numerics.parallel.processes * (numerics.threads if numerics.device == "cpu" else 1)
    saves_time = flops is not None and flops / workers >= WORTHWHILE_FLOPS[numerics.device]
    gathers_weights = numerics.parallel.engine == "zero3"
    if numerics.compile == "never" or (numerics.compile == "auto" and (gathers_weights or not saves_time)):
        return False
    compiler = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((compiler,) if compiler else COMPILERS)):
        raise StageError(
            f"numerics.compile is {numerics.compile}, but torch.compile needs a C++ compiler, found none (looked for "
            f"{compiler or ', '.join(COMPILERS)}): install one (`apt install g++`), or set numerics.compile to never."
        )
    return True


def compile_for(call: Callable[..., Any], model: "torch.nn.Module", *, static_shapes: bool) -> Callable[..., Any]:
    """Return a function of a model compiled for inputs of one shape (`static_shapes`), or of any shape.

    Either way there is one graph. torch's default (`dynamic=None`) specializes on the first shape and recompiles for
    dynamic shapes later, so a resumed run, which starts with another batch, would give other bytes.
    """
    import torch

    rotary.install(model)
    compiled: Callable[..., Any] = torch.compile(call, dynamic=not static_shapes)
    return compiled
