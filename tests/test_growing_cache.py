"""The growing cache equals Transformers' cache step by step, also when rows are removed from the batch."""

from typing import Any

import pytest

from tasks.common.overrides.growing_cache import GrowingLayer, growing_cache


@pytest.mark.parametrize("removal_step", [None, 3, 7])
def test_growing_cache_equals_dynamic_cache(removal_step: int | None) -> None:
    """A prompt of five tokens, then nine single tokens; half of the rows are removed in between."""
    import torch
    from transformers.cache_utils import DynamicCache

    ours, plain = growing_cache(config()), DynamicCache(config=config())
    generator = torch.Generator().manual_seed(0)
    rows, pairs = [0, 1, 2, 3], []
    for step in range(10):
        count = 5 if step == 0 else 1
        for block in range(2):
            keys, values = (torch.randn(len(rows), 3, count, width, generator=generator) for width in (4, 6))
            actual, expected = (cache.update(keys, values, block) for cache in (ours, plain))
            assert all(one.equal(other) for one, other in zip(actual, expected, strict=True))
            pairs.append((actual[0], actual[0].clone()))
        if step == removal_step:
            rows = rows[::2]
            for cache in (ours, plain):
                cache.batch_select_indices(torch.tensor([0, 2]))
        assert ours.get_seq_length() == plain.get_seq_length() == 5 + step
    assert all(returned.equal(snapshot) for returned, snapshot in pairs)  # returned tensors are not overwritten


def test_sliding_window_layers_keep_transformers_class() -> None:
    """Such a layer drops old tokens, which `GrowingLayer` does not."""
    kinds = [type(layer) for layer in growing_cache(config(sliding_window=4)).layers]
    assert len(kinds) == 2
    assert GrowingLayer not in kinds


def config(**changes: Any) -> Any:
    """Return the config of a model of two blocks."""
    from transformers import MistralConfig

    return MistralConfig(**{
        "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3, "sliding_window": None, **changes
    })  # fmt: skip
