"""Attention masks by broadcasting, worked out once where they are compiled (`apart.py`).

Transformers 4.57 maps the rule over all pairs of places with `torch.vmap` instead, which takes 5 ms a forward pass on a
CPU: as long as a small model's own work on a few rows (docs/decisions.md). Transformers 5 broadcasts by itself.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import apart

if TYPE_CHECKING:
    import torch


def provide() -> None:
    """Have Transformers make its masks so in this process; each is the same to the bit."""
    import transformers
    from transformers.masking_utils import AttentionMaskInterface

    apart.provide()
    AttentionMaskInterface.register("eager", additive)
    if transformers.__version__.startswith("4."):
        AttentionMaskInterface.register("sdpa", boolean)


def boolean(
    batch_size: int, cache_position: "torch.Tensor", kv_length: int, kv_offset: int, mask_function: Callable[..., Any],
    attention_mask: "torch.Tensor | None" = None, local_size: int | None = None, allow_is_causal_skip: bool = True,
    **_: Any,
) -> "torch.Tensor | None":  # fmt: skip
    """Return which keys each query sees, (B, 1, Q, K); None where torch's own causal attention says the same.

    The names are those that Transformers calls it with: queries stand at `cache_position`, (Q,), keys from `kv_offset`
    on, and `attention_mask`, (B, more than K), tells padding.
    """
    import torch
    from transformers import masking_utils

    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset, _slice=False)
    queries, device = len(cache_position), cache_position.device
    if allow_is_causal_skip and masking_utils._ignore_causal_mask_sdpa(
        padding, queries, kv_length, kv_offset, local_size
    ):
        return None
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    keys = torch.arange(kv_length, device=device) + kv_offset
    seen: torch.Tensor = mask_function(rows, torch.zeros_like(rows), cache_position[:, None], keys)
    if padding is not None:
        seen = seen & padding[rows, keys]
    return seen.expand(batch_size, 1, queries, kv_length)


def additive(*positional: Any, **named: Any) -> "torch.Tensor | None":
    """Return what is added to the scores, (B, 1, Q, K): 0 for seen keys, the lowest value for others."""
    import transformers
    from transformers import masking_utils

    make = _additive if transformers.__version__.startswith("4.") else masking_utils.eager_mask
    found = make(*positional, **named)
    return None if found is None else apart.once(found)


def _additive(*, dtype: "torch.dtype", **named: Any) -> "torch.Tensor":
    import torch

    seen = boolean(**{**named, "allow_is_causal_skip": False})
    assert seen is not None  # never left out
    return torch.where(seen, torch.zeros((), dtype=dtype, device=seen.device), torch.finfo(dtype).min)
