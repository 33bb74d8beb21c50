"""Attention masks that are computed once: identical bit for bit to Transformers' masks."""

from itertools import product
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, masking_utils
from transformers.cache_utils import DynamicCache

from tasks.common.overrides import masks

ROWS, LAYERS, HEADS, WIDTH = 3, 2, 2, 8
PADDED = {"unsaid": None, "none": slice(0), "left": slice(3), "right": slice(-3, None)}


def build_mask(make: Any, padded: slice | None, past_length: int, packed: list[int] | None) -> Any:
    """Return the mask by `make` for 9 tokens, or for one more after `past` tokens; the sliding window is 5."""
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS, attn_implementation="eager"
    )
    config.sliding_window = 5
    tokens, cache, mask = 1 if past_length else 9, None, None
    if past_length:
        cache = DynamicCache(config=config)
        for layer in range(LAYERS):
            keys, values = torch.zeros(2, ROWS, HEADS, past_length, WIDTH)
            cache.update(keys, values, layer)
    if padded is not None:
        mask = torch.ones(ROWS, past_length + tokens, dtype=torch.long)
        mask[1, padded] = 0
    positions = None if packed is None else torch.tensor([packed] * ROWS)
    states = torch.zeros(ROWS, tokens, HEADS * WIDTH)
    return make(config, states, mask, past_key_values=cache, position_ids=positions)


@pytest.mark.parametrize(
    "make", [masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask]
)  # fmt: skip
def test_masks_equal_transformers_masks(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    cases = [
        *product(PADDED.values(), (0, 6), [None]),
        (None, 0, [0, 1, 2, 0, 1, 2, 3, 0, 1]),  # several texts in a row
    ]
    mapping = masking_utils.AttentionMaskInterface._global_mapping
    monkeypatch.setitem(mapping, "eager", masking_utils.eager_mask)
    expected = [build_mask(make, *case) for case in cases]
    monkeypatch.setitem(mapping, "eager", masks.additive_mask)
    for mine, theirs in zip([build_mask(make, *case) for case in cases], expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert any(not mask.all() for mask in expected)


def test_install_registers_additive_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = masking_utils.AttentionMaskInterface._global_mapping
    monkeypatch.setitem(mapping, "eager", masking_utils.eager_mask)
    masks.install()
    assert mapping["eager"] is masks.additive_mask
