"""Attention masks that a compiled graph computes once for all blocks (`materialize.py`).

Replaces: transformers.masking_utils.eager_mask (transformers 5.5)
Delete when: compiled steps are as fast without `materialize.compute_once`.
"""

from typing import TYPE_CHECKING, Any

from tasks.common.overrides import materialize

if TYPE_CHECKING:
    import torch


def install() -> None:
    """Register the mask function with Transformers in this process; the masks are identical bit for bit."""
    from transformers.masking_utils import AttentionMaskInterface

    materialize.install()
    AttentionMaskInterface.register("eager", additive_mask)


def additive_mask(*args: Any, **kwargs: Any) -> "torch.Tensor | None":
    """Return the additive mask (B, 1, Q, K): 0 for visible keys, the dtype's lowest value for others."""
    from transformers import masking_utils

    mask: torch.Tensor | None = masking_utils.eager_mask(*args, **kwargs)
    return None if mask is None else materialize.compute_once(mask)
