"""A model cut in two says what it said in one piece, and one that cannot be cut so is told."""

from typing import Any

import pytest

from tasks.common.modelling import methods
from tasks.common.modelling.halves import Halves, twin

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}


def built(kind: str) -> Any:
    """Return a fresh model of an architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(kind, **(SHAPE if kind == "llama" else GROUPED), pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_two_halves_are_the_whole(kind: str, layers: int) -> None:
    """Logits and last states of rows padded on the left."""
    import torch

    model = built(kind)
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


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox"])
def test_a_model_of_another_build_is_not_cut(kind: str) -> None:
    """Gemma scales states that it is given, as if they were embeddings; GPT-NeoX has a norm of another name."""
    assert Halves.of(built(kind), 1) is None


def test_what_the_upper_half_learns_the_whole_has_learnt_and_the_twin_has_not() -> None:
    """Frozen weights are held once by all three."""
    import torch

    model = built("llama")
    methods.apply(model, methods.Top(name="top", layers=1))
    halves = Halves.of(model, 1)
    assert halves
    kept = twin(halves.upper)
    before = kept.lm_head.weight.clone(), kept.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        halves.upper.model.layers[0].mlp.up_proj.weight += 1.0
    torch.testing.assert_close(model.model.layers[2].mlp.up_proj.weight, before[1] + 1.0)
    assert (kept.model.layers[0].mlp.up_proj.weight == before[1]).all()
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert kept.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert kept.lm_head.weight is not model.lm_head.weight  # it is trained
