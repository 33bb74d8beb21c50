"""A key–value cache with preallocated buffers: a new token is written in place, where Transformers copies the cache.

The copy took a quarter of a small model's decoding time on a CPU (docs/explanation/training.md). Imports Transformers,
so import it only for decoding.

Replaces: transformers.cache_utils.DynamicLayer (transformers 5.5)
Delete when: Transformers has a cache that grows without copying what it holds.
"""

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    import torch


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, T, D) of one block: views of the first T positions of longer buffers."""

    keys: "torch.Tensor"
    values: "torch.Tensor"

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor] = []  # for keys and values
        # The latest returned keys. If `self.keys` is another tensor, rows were selected or reordered since.
        self.last_keys: Any = None

    def update(
        self, key_states: "torch.Tensor", value_states: "torch.Tensor", *args: Any, **kwargs: Any
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Append the states (B, H, N, D) of N tokens and return the keys and values of all tokens."""
        start, added = self.get_seq_length(), key_states.shape[-2]
        if not start:
            first: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return first
        end = start + added
        if self.keys is not self.last_keys or end > self.buffers[0].shape[-2]:
            shape = (*key_states.shape[:-2], end + end // 2, key_states.shape[-1])
            self.buffers = [key_states.new_empty(shape), value_states.new_empty((*shape[:-1], value_states.shape[-1]))]
            current: Any
            for buffer, current in zip(self.buffers, (self.keys, self.values), strict=True):
                buffer[..., :start, :] = current
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        self.last_keys = self.keys
        return self.keys, self.values


def growing_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model config; sliding-window layers keep Transformers' class."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
