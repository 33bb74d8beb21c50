"""When to use torch.compile, and what it needs (`numerics.compile`).

Compiling takes seconds for each layer of the model before the first step and then saves a fifth of each step on a CPU
(benchmarks/LOG.md), more on a GPU. So `auto` compiles runs that save more time than compiling takes. Both are estimated
from the model's layers and the FLOPs of the whole run, not measured: the choice affects the bytes of a result, so it
must be the same on every machine.
"""

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError
from tasks.common.harness.launch import rank
from tasks.common.overrides import rotary
from tasks.common.settings import Numerics

if TYPE_CHECKING:
    import torch

# Model FLOPs per second without compilation: in bfloat16 on a thread of an AMD EPYC (Zen 4), and on an H100.
FLOPS_PER_SECOND = {"cpu": 1.1e11, "cuda": 3e14}
# Seconds that compiling takes, and those of each layer: on a CPU those of a decoder with low-rank updates of all its
# linear layers (benchmarks/LOG.md); on a GPU estimates.
COMPILE_SECONDS = {"cpu": (35, 10), "cuda": (30, 3)}
SAVED_SHARE = 0.2  # of a step's time
COMPILERS = ("g++", "clang++", "c++")


def layer_count(model: Any) -> int:
    """Return the number of layers of a Transformers model."""
    return int(model.config.get_text_config().num_hidden_layers)


def compile_seconds(layers: int, device: str) -> int:
    """Return about how many seconds it takes to compile a training step of a model with so many layers."""
    once, per_layer = COMPILE_SECONDS[device]
    return once + per_layer * layers


def should_compile(numerics: Numerics, flops: float | None, layers: int) -> bool:
    """Return whether to compile a run of `flops` model FLOPs (None: unknown) of a model with so many layers.

    Raises StageError if it should be compiled and there is no C++ compiler.
    """
    workers = numerics.parallel.processes * (numerics.threads if numerics.device == "cpu" else 1)
    saved_seconds = SAVED_SHARE * (flops or 0) / workers / FLOPS_PER_SECOND[numerics.device]
    saves_time = saved_seconds >= compile_seconds(layers, numerics.device)
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

    if not rank():
        seconds = compile_seconds(layer_count(model), next(model.parameters()).device.type)
        print(f"compiling in the first step, about {seconds} s; less where it was compiled before", flush=True)
    rotary.install(model)
    compiled: Callable[..., Any] = torch.compile(call, dynamic=not static_shapes)
    return compiled
