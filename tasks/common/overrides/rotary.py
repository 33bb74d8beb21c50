"""Rotary position embeddings that compile to faster code: angles computed once, halves taken by `chunk`.

Transformers slices the two halves. The gradient of a slice is padded to the full width, which compiles to element by
element code. The gradient of `chunk` is a concatenation and takes a third of the time (docs/explanation/training.md).

Replaces: transformers.models.llama.modeling_llama.rotate_half (transformers 5.5), and its twins of other models
Delete when: compiled steps are as fast without it (`make bench-speed`).
"""

import sys
from typing import TYPE_CHECKING, Any

from tasks.common.overrides import materialize

if TYPE_CHECKING:
    import torch


def install(model: "torch.nn.Module") -> None:
    """Patch a model's rotary embeddings in this process; the results are identical bit for bit."""
    materialize.install()
    for module in model.modules():
        if (
            type(module).__name__.endswith("RotaryEmbedding")
            and _materialize_angles not in module._forward_hooks.values()
        ):
            module.register_forward_hook(_materialize_angles)
        _replace_rotate_half(type(module))


def _materialize_angles(_module: Any, _inputs: Any, angles: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
    """Forward hook: materialize cosines and sines."""
    return tuple(materialize.compute_once(part) for part in angles)


def _replace_rotate_half(module_class: type) -> None:
    """Replace `rotate_half` in a module class's file by the one below, if both give the same result."""
    import torch

    module_globals = vars(sys.modules[module_class.__module__])
    original, sample = module_globals.get("rotate_half"), torch.arange(8.0)
    # Some models (Cohere) rotate adjacent pairs instead of halves.
    if original is not None and torch.equal(original(sample), rotate_half(sample)):
        module_globals["rotate_half"] = rotate_half


def rotate_half(states: "torch.Tensor") -> "torch.Tensor":
    """Return states (…, 2W) with halves swapped and the new first half negated (Su et al. 2021, equation 34)."""
    import torch

    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
