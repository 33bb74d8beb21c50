"""A model split in two gives the same logits; an architecture that cannot be split is detected."""

from typing import Any

import pytest

from tasks.align.halves import Halves, frozen_copy
from tasks.common.modelling import methods

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}


def make_model(kind: str) -> Any:
    """Return a new model of an architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(kind, **(SHAPE if kind == "llama" else GROUPED), pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_model_with_two_kinds_of_attention_is_not_split() -> None:
    """A half would number its layers anew, and take another kind for each."""
    assert Halves.of(make_model("gemma2"), 1) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_split_model_matches_the_whole_model(kind: str, layers: int) -> None:
    """Logits and last states of left-padded rows."""
    import torch

    model = make_model(kind)
    halves = Halves.of(model, layers)
    assert halves
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    places = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    with torch.no_grad():
        whole = model(input_ids=ids, output_hidden_states=True, **places)
        below = halves.lower(input_ids=ids, **places).last_hidden_state
        above = halves.upper(inputs_embeds=below, output_hidden_states=True, **places)
    real = mask.bool()
    torch.testing.assert_close(above.logits[real], whole.logits[real])
    torch.testing.assert_close(above.hidden_states[-1][real], whole.hidden_states[-1][real])
    torch.testing.assert_close(below[real], whole.hidden_states[3 - layers][real])
    assert len(model.base_model.layers) == 3


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_an_unsupported_architecture_is_not_split(kind: str) -> None:
    """GPT-2 adds positions to its input embeddings; GPT-NeoX has another name for its norm."""
    assert Halves.of(make_model(kind), 1) is None


def test_upper_half_updates_do_not_change_the_frozen_copy() -> None:
    """All three share the frozen weights."""
    import torch

    model = make_model("llama")
    methods.apply(model, methods.TopLayers(name="top_layers", layers=1))
    halves = Halves.of(model, 1)
    assert halves
    frozen = frozen_copy(halves.upper)
    before = frozen.lm_head.weight.clone(), frozen.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        halves.upper.model.layers[0].mlp.up_proj.weight += 1.0
    torch.testing.assert_close(model.model.layers[2].mlp.up_proj.weight, before[1] + 1.0)
    assert (frozen.model.layers[0].mlp.up_proj.weight == before[1]).all()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert frozen.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert frozen.lm_head.weight is not model.lm_head.weight  # it is trained
