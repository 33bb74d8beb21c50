"""What a compiled program works out once, apart from whatever reads it.

A compiler merges what is worked out with its readers. That pays for sums and products; but positions' sines and the
attention mask are then worked out anew for each head, layer and number: a fifth of a step (docs/decisions.md).
"""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def provide() -> None:
    """Register the operator in this process: a copy of a tensor, into which the compiler cannot see."""
    import torch

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    torch.library.custom_op("bessemer::once", copied, mutates_args=()).register_fake(copied)


def once(tensor: "torch.Tensor") -> "torch.Tensor":
    """Set a tensor apart in a program that is being compiled (after `provide`), and leave it as it is elsewhere."""
    import torch

    if not torch.compiler.is_compiling():
        return tensor
    copy: torch.Tensor = torch.ops.bessemer.once.default(tensor)
    return copy
