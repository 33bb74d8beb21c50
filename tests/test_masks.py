"""Masks by broadcasting: the same to the bit as Transformers' own."""

from itertools import product
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, masking_utils
from transformers.cache_utils import DynamicCache

from tasks.common.modelling import masks

ROWS, LAYERS, HEADS, WIDTH = 3, 2, 2, 8
THEIRS = {"sdpa": masking_utils.sdpa_mask, "eager": masking_utils.eager_mask}
PADDED = {"unsaid": None, "none": slice(0), "left": slice(3), "right": slice(-3, None)}


def made(attention: str, make: Any, padded: slice | None, past: int, packed: list[int] | None) -> Any:
    """Return the mask of a row of 9 tokens, or of one more after `past`, of a model that sees five back in `make`."""
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS, sliding_window=5,
        attn_implementation=attention,
    )  # fmt: skip
    tokens, cache, mask = 1 if past else 9, None, None
    if past:
        cache = DynamicCache(config=config)
        for layer in range(LAYERS):
            keys, values = torch.zeros(2, ROWS, HEADS, past, WIDTH)
            cache.update(keys, values, layer)
    if padded is not None:
        mask = torch.ones(ROWS, past + tokens, dtype=torch.long)
        mask[1, padded] = 0
    positions = None if packed is None else torch.tensor([packed] * ROWS)
    states = torch.zeros(ROWS, tokens, HEADS * WIDTH)
    return make(config, states, mask, torch.arange(past, past + tokens), cache, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "make", [masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask]
)  # fmt: skip
def test_every_mask_is_transformers_own(monkeypatch: pytest.MonkeyPatch, attention: str, make: Any) -> None:
    cases = [
        *product(PADDED.values(), (0, 6), [None]),
        (None, 0, [0, 1, 2, 0, 1, 2, 3, 0, 1]),  # several texts in a row
    ]
    mapping = masking_utils.AttentionMaskInterface._global_mapping
    monkeypatch.setitem(mapping, attention, THEIRS[attention])
    expected = [made(attention, make, *case) for case in cases]
    monkeypatch.setitem(mapping, attention, {"sdpa": masks.boolean, "eager": masks.additive}[attention])
    found = [made(attention, make, *case) for case in cases]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert any(mine is not None and not mine.all() for mine in found)


def test_stages_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = masking_utils.AttentionMaskInterface._global_mapping
    for name, theirs in THEIRS.items():
        monkeypatch.setitem(mapping, name, theirs)
    masks.provide()
    assert mapping["sdpa"] is masks.boolean
    assert mapping["eager"] is masks.additive
