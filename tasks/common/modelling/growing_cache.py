"""A key–value cache with room for what comes: a token is written into it, where Transformers' own copies it all anew.

That copy was a quarter of a small model's decoding time on a CPU (docs/decisions.md). Imported only where something is
decoded: its base is Transformers'.
"""

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    import torch


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, T, D) of one block, as the first T places of longer tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room: list[torch.Tensor] = []  # the longer tensors of keys and values
        self.shown: Any = None  # the keys as they were last given out: others have been put in their place since

    def update(
        self, key_states: "torch.Tensor", value_states: "torch.Tensor", *rest: Any, **named: Any
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Add the states (B, H, N, D) of N further tokens and return those of all."""
        start, more = self.get_seq_length(), key_states.shape[-2]
        if not start:
            return super().update(key_states, value_states, *rest, **named)
        end = start + more
        if self.keys is not self.shown or end > self.room[0].shape[-2]:
            shape = (*key_states.shape[:-2], end + end // 2, key_states.shape[-1])
            self.room = [key_states.new_empty(shape), value_states.new_empty((*shape[:-1], value_states.shape[-1]))]
            known: Any
            for longer, known in zip(self.room, (self.keys, self.values), strict=True):
                longer[..., :start, :] = known
        for longer, new in zip(self.room, (key_states, value_states), strict=True):
            longer[..., start:end, :] = new
        self.keys, self.values = (longer[..., :end, :] for longer in self.room)
        self.shown = self.keys
        return self.keys, self.values


def growing_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model of this config; layers that keep a sliding window are Transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
