"""Tensors that a compiled graph computes once instead of fusing them into every reader.

Inductor fuses pointwise computations into their readers. For rotary sines and the attention mask this recomputes them
for each head, layer and element, which takes a fifth of a step (docs/explanation/training.md).

Replaces: torch.compile (torch 2.13), as far as it fuses these computations with their readers
Delete when: Inductor computes a value with many readers once by itself (`make bench-speed` with it and without).
"""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def install() -> None:
    """Register the operator in this process: a tensor copy that is opaque to the compiler."""
    import torch

    def opaque_copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    torch.library.custom_op("bessemer::once", opaque_copy, mutates_args=()).register_fake(opaque_copy)


def compute_once(tensor: "torch.Tensor") -> "torch.Tensor":
    """Materialize a tensor in a graph that is being compiled; return it unchanged in eager mode. Needs `install`."""
    import torch

    if not torch.compiler.is_compiling():
        return tensor
    copy: torch.Tensor = torch.ops.bessemer.once.default(tensor)
    return copy
