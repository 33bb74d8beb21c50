"""When torch.compile pays, and what it needs (`numerics.compile`).

Compiling takes 10–60 s before the first step and then saves a fifth of each step on a CPU (benchmarks/LOG.md), more on
a GPU. So `auto` compiles what would take about five minutes and more without it. How long that is, is judged by the
model FLOPs of the whole run and not by a clock: the choice bears on the bytes of a result, so it must be the same on
every machine.
"""

import os
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import apart
from tasks.common.settings import Numerics
from tasks.common.stage import StageError

if TYPE_CHECKING:
    import torch

# Model FLOPs that one thread, or one GPU, does in about five minutes without a compiler: 110 GFLOP/s in bfloat16 on a
# thread of an AMD EPYC (Zen 4), 300 TFLOP/s on an H100.
PAYS = {"cpu": 3e13, "cuda": 1e17}
COMPILERS = ("g++", "clang++", "c++")


def worthwhile(numerics: Numerics, flops: float | None) -> bool:
    """Return whether a run of so many model FLOPs (None: unknown) is to be compiled; raise StageError if it cannot."""
    workers = numerics.parallel.processes * (numerics.threads if numerics.device == "cpu" else 1)
    pays = flops is not None and flops / workers >= PAYS[numerics.device]
    piecemeal = numerics.parallel.engine == "zero3"
    if numerics.compile == "never" or (numerics.compile == "auto" and (piecemeal or not pays)):
        return False
    wanted = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((wanted,) if wanted else COMPILERS)):
        raise StageError(
            f"numerics.compile is {numerics.compile}, but there is no C++ compiler here (looked for "
            f"{wanted or ', '.join(COMPILERS)}), and torch.compile needs one: install it (`apt install g++`), or set "
            "numerics.compile to never."
        )
    return True


def compiled(call: Callable[..., Any], model: "torch.nn.Module", *, steady: bool) -> Callable[..., Any]:
    """Return a function of a model compiled for inputs of one shape (`steady`), or of any.

    One program in either case, whichever batch a resumed run begins with: torch's own way, which is to begin with the
    first shape and to widen the program when another comes, would give other bytes.
    """
    import torch

    apart.provide()
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding") and _angles_once not in module._forward_hooks.values():
            module.register_forward_hook(_angles_once)
        _rotate_by_parts(type(module))
    made: Callable[..., Any] = torch.compile(call, dynamic=not steady)
    return made


def _angles_once(_module: Any, _arguments: Any, found: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
    """Hook: set cosines and sines apart."""
    return tuple(apart.once(part) for part in found)


def _rotate_by_parts(kind: type) -> None:
    """Let a kind of module rotate by `rotate_half` below, where what Transformers has beside it does the same.

    Theirs cuts the halves out by their places. Such a cut's gradient is padded to the whole, which the compiler does
    number by number; that of parts is the parts' gradients in a row, in a third of the time (docs/decisions.md).
    """
    import torch

    beside = vars(sys.modules[kind.__module__])
    theirs, sample = beside.get("rotate_half"), torch.arange(8.0)
    if theirs is not None and torch.equal(theirs(sample), rotate_half(sample)):  # some pair neighbours
        beside["rotate_half"] = rotate_half


def rotate_half(states: "torch.Tensor") -> "torch.Tensor":
    """Return states (…, 2W) as their second half negated and then their first (Su et al. 2021, equation 34)."""
    import torch

    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
