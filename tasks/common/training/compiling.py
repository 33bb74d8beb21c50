"""When torch.compile pays, and what it needs (`numerics.compile`).

Compiling takes 10–60 s before the first step and then saves a fifth of each step on a CPU (benchmarks/LOG.md), more on
a GPU. So `auto` compiles what would take about five minutes and more without it. How long that is, is judged by the
model FLOPs of the whole run and not by a clock: the choice bears on the bytes of a result, so it must be the same on
every machine.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

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

    _mask_once()
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(_angles_once())
    made: Callable[..., Any] = torch.compile(call, dynamic=not steady)
    return made


@cache
def _once() -> Callable[..., Any]:
    """Return an operator that gives a copy of a tensor and that the compiler cannot see into.

    It merges what is worked out with whatever reads it, which pays for sums and products; but positions' sines and the
    attention mask are then worked out anew for each head, layer and number: a fifth of a step (docs/decisions.md).
    """
    import torch

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    torch.library.custom_op("bessemer::once", copied, mutates_args=()).register_fake(copied)
    operator: Callable[..., Any] = torch.ops.bessemer.once.default
    return operator


@cache
def _angles_once() -> Callable[..., Any]:
    """Return a hook by which compiled programs work out the cosines and sines of rotary positions once."""
    import torch

    once = _once()

    def hook(_module: Any, _arguments: Any, found: Any) -> Any:
        return tuple(once(part) for part in found) if torch.compiler.is_compiling() else found

    return hook


@cache
def _mask_once() -> None:
    """Have compiled programs of this process work out eager attention's additive mask once."""
    import torch
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    once, made = _once(), ALL_MASK_ATTENTION_FUNCTIONS["eager"]

    def mask(*positional: Any, **named: Any) -> Any:
        found = made(*positional, **named)
        return once(found) if torch.compiler.is_compiling() and found is not None else found

    AttentionMaskInterface.register("eager", mask)
