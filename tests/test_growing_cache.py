"""The cache holds what Transformers' own does, step by step, also where rows leave the batch and others are put in."""

from typing import Any

import pytest

from tasks.common.modelling.growing_cache import GrowingLayer, growing_cache


@pytest.mark.parametrize("leaving", [None, 3, 7])
def test_states_are_those_of_a_cache_that_is_copied(leaving: int | None) -> None:
    """A prompt of five tokens, then nine of one each; half of the rows leave in between."""
    import torch
    from transformers.cache_utils import DynamicCache

    ours, plain = growing_cache(config()), DynamicCache(config=config())
    generator = torch.Generator().manual_seed(0)
    rows, read = [0, 1, 2, 3], []
    for step in range(10):
        count = 5 if step == 0 else 1
        for block in range(2):
            keys, values = (torch.randn(len(rows), 3, count, width, generator=generator) for width in (4, 6))
            found, expected = (cache.update(keys, values, block) for cache in (ours, plain))
            assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
            read.append((found[0], found[0].clone()))
        if step == leaving:
            rows = rows[::2]
            for cache in (ours, plain):
                cache.batch_select_indices(torch.tensor([0, 2]))
        assert ours.get_seq_length() == plain.get_seq_length() == 5 + step
    assert all(given.equal(then) for given, then in read)  # what was given out is not written over


def test_a_sliding_window_is_left_to_transformers() -> None:
    """Its layer forgets, which ours does not."""
    kinds = [type(layer) for layer in growing_cache(config(sliding_window=4)).layers]
    assert len(kinds) == 2
    assert GrowingLayer not in kinds


def config(**changes: Any) -> Any:
    """Return the config of a model of two blocks."""
    from transformers import MistralConfig

    return MistralConfig(**{
        "num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3, "sliding_window": None, **changes
    })  # fmt: skip
