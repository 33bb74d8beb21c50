"""Fine-tuning methods: each trains what it says, merges into a plain model, and refuses what it cannot do."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common.modelling import adapters, methods, models
from tasks.common.settings import Dtypes, SettingsError, check, read_params
from tasks.common.stage import StageError
from tests.conftest import ROOT
from tests.training_fixtures import LORA, NUMERICS, QLORA, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain


@pytest.fixture
def model(chain: Chain) -> Any:
    """A fresh copy of the base decoder."""
    return models.load_decoder(chain.path("data/pretrain/clm/model"), NUMERICS)


def method(**settings: Any) -> Any:
    """Return a method's settings, checked."""
    return config("finetune", method=settings).method


def weights(path: Path) -> dict[str, Any]:
    """Return a saved model's tensors by name."""
    from safetensors.torch import load_file

    return dict(load_file(path / "model.safetensors"))


def weight_of(model: Any, name: str) -> Any:
    """Return a layer's matrix."""
    return model.get_submodule(name).weight.detach().cpu()


def before_and_after(settings: dict[str, Any], chain: Chain, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the base model's weights and those that a few steps of a method left."""
    tiny = config("finetune", method=settings, steps=4)
    job = chain.job("finetune", tiny, folder)
    chain.run(job, tiny)
    return weights(chain.path("data/pretrain/clm/model")), weights(job.outputs["model"])


def changed_weights(settings: dict[str, Any], chain: Chain, folder: Path) -> dict[str, Any]:
    """Return what a few steps of a method added to each of the base model's weights."""
    before, after = before_and_after(settings, chain, folder)
    assert set(before) == set(after)
    return {name: after[name] - before[name] for name in before}


def test_full_trains_every_weight(chain: Chain, tmp_path: Path) -> None:
    """No weight of the model stays as it was."""
    assert all(change.any() for change in changed_weights({"name": "full"}, chain, tmp_path).values())


def test_top_leaves_the_blocks_beneath_untouched(chain: Chain, tmp_path: Path) -> None:
    """The last block, the final norm and the head (with the embeddings tied to it) move; nothing else, bit for bit."""
    changes = changed_weights({"name": "top", "layers": 1}, chain, tmp_path)
    moved = {name for name, change in changes.items() if change.any()}
    assert moved == {
        name for name in changes if name.startswith(("model.layers.1.", "model.norm.", "model.embed_tokens."))
    }


@pytest.mark.parametrize(("targets", "layers"), [("all-linear", "_proj"), ("attention", "self_attn.")])
def test_lora_adds_a_low_rank_to_linear_layers(targets: str, layers: str, chain: Chain, tmp_path: Path) -> None:
    """Each linear layer that is aimed at has changed by a matrix of at most the rank; nothing else has."""
    import torch

    changes = changed_weights({**LORA, "targets": targets}, chain, tmp_path)
    for name, change in changes.items():
        if layers in name:
            values = torch.linalg.svdvals(change)
            assert values[0] > 0
            assert values[3] < 1e-4 * values[0]  # float32 rounding of the sum with the weight
        else:
            assert not change.any()


@pytest.mark.parametrize(
    ("changes", "scale"), [({}, 6 / 3), ({"rank_stabilized": True}, 6 / 3**0.5), ({"alpha": 1}, 1 / 3)]
)
def test_an_update_is_scaled_as_its_paper_says(changes: dict[str, Any], scale: float, model: Any) -> None:
    """W + alpha / rank x B A; rank-stabilised: W + alpha / sqrt(rank) x B A."""
    import torch

    name = "model.layers.0.mlp.up_proj"
    before = weight_of(model, name).clone()
    trained: Any = methods.apply(model, method(**{**LORA, **changes}))
    layer: Any = trained.base_model.model.get_submodule(name)
    layer.lora_B["default"].weight.data.normal_()
    update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    after = weight_of(methods.merge(trained, method(**{**LORA, **changes})), name)
    torch.testing.assert_close(after, before + scale * update)


def test_dora_trains_magnitudes_apart(model: Any) -> None:
    """Liu et al. 2024, equation 5: W' = m x (W + BA) / its norm, by output neuron; at first m is the norm of W."""
    import torch

    settings = method(**{**LORA, "dora": True})
    name = "model.layers.1.self_attn.v_proj"
    before = weight_of(model, name).clone()
    trained: Any = methods.apply(model, settings)
    layer: Any = trained.base_model.model.get_submodule(name)
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), before.norm(dim=1))
    layer.lora_B["default"].weight.data.normal_(std=0.1)
    magnitude.data.mul_(1.5)
    direction = before + 2.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    expected = magnitude.detach()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight_of(methods.merge(trained, settings), name), expected)


@pytest.mark.parametrize(
    "settings", [LORA, {**LORA, "dora": True}, {"name": "adapter", "width": 7}], ids=["lora", "dora", "adapter"]
)
def test_what_is_merged_computes_what_it_did_beside_the_weights(settings: dict[str, Any], model: Any) -> None:
    """At first it changes nothing; once trained, the merged model is a plain one with the same logits."""
    import torch

    ids = torch.arange(20)[None]
    chosen = method(**settings)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        trained: Any = methods.apply(model, chosen).eval()
        torch.testing.assert_close(trained(input_ids=ids).logits, plain, atol=2e-5, rtol=0)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "adapter.down_proj" in name):  # these begin at 0
                parameter.normal_(std=0.05, generator=generator)
        expected = trained(input_ids=ids).logits
        assert (expected - plain).abs().max() > 0.1
        merged = methods.merge(trained, chosen)
        found = merged(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # sums of 96 float32 products in another order
    names = {name for name, _ in merged.named_parameters()}
    assert not any("lora" in name or "adapter" in name for name in names)
    assert type(merged).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_folded_updates_compute_what_they_did_beside_the_weights_which_come_back_to_the_bit(
    dora: bool, model: Any
) -> None:
    """Also where what was done within ends with an error."""
    import torch

    ids = torch.arange(20)[None]
    chosen = method(**{**LORA, "dora": dora})
    trained: Any = methods.apply(model, chosen).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        before = {name: weight.clone() for name, weight in trained.state_dict().items()}
        expected = trained(input_ids=ids).logits
        with contextlib.suppress(KeyError), methods.folded(trained, chosen):
            torch.testing.assert_close(trained(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
            moved = [name for name, weight in trained.state_dict().items() if not weight.equal(before[name])]
            assert len(moved) == (0 if dora else 14)  # of each of two blocks: four of attention, three of feed-forward
            raise KeyError
        assert trained(input_ids=ids).logits.equal(expected)
    assert all(weight.equal(before[name]) for name, weight in trained.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"targets": "attention", "dropout": 0.2}], ids=["all-linear", "attention"])
def test_frozen_weights_in_two_bytes_train_to_the_same_bytes(
    changes: dict[str, Any], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products are in bfloat16, it is no matter when a frozen weight becomes so; what is saved is float32."""
    import torch

    numerics = NUMERICS.model_copy(update={"dtype": Dtypes(decoder="bfloat16", encoder="float32")})
    tiny = config("finetune", method={**LORA, **changes}, steps=4)
    jobs = [chain.job("finetune", tiny, tmp_path / name, numerics=numerics) for name in ("two", "four")]
    seen: list[set[Any]] = []
    store = methods.store_as_computed

    def watched(model: Any, *parts: Any) -> None:
        store(model, *parts)
        seen.append({parameter.dtype for parameter in model.parameters() if not parameter.requires_grad})

    monkeypatch.setattr(methods, "store_as_computed", watched)
    chain.run(jobs[0], tiny)
    assert seen == [{torch.float32, torch.bfloat16}]
    monkeypatch.setattr(methods, "store_as_computed", lambda *_: None)
    chain.run(jobs[1], tiny)
    two, four = (weights(job.outputs["model"]) for job in jobs)
    assert {tensor.dtype for tensor in two.values()} == {torch.float32}
    assert all(two[name].equal(four[name]) for name in four)


def test_a_merged_adapter_is_more_neurons(chain: Chain, tmp_path: Path) -> None:
    """The saved folder loads as a plain model whose feed-forward layers are wider; the old neurons are untouched."""
    before, after = before_and_after({"name": "adapter", "width": 5}, chain, tmp_path)
    for name, old in before.items():
        new = after[name]
        if "mlp." in name:
            axis = 1 if "down_proj" in name else 0
            assert new.shape[axis] == old.shape[axis] + 5 == 101
            assert new.narrow(axis, 0, old.shape[axis]).equal(old)
            assert new.narrow(axis, old.shape[axis], 5).any()
        else:
            assert new.equal(old)
    loaded = models.load_decoder(tmp_path / "model/model", NUMERICS)
    assert loaded.config.intermediate_size == 101
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items() if name in after} == {
        name: tensor.shape for name, tensor in after.items()
    }


def test_a_merged_adapter_keeps_biases(model: Any) -> None:
    """A gated layer with biases: those of the new neurons come beside the old ones, those of the output add up."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = copy.deepcopy(model.config.to_dict()) | {"mlp_bias": True}
    biased: Any = LlamaForCausalLM(LlamaConfig.from_dict(settings)).eval()
    adapters.add(biased, 3)
    with torch.no_grad():
        for name, parameter in biased.named_parameters():
            if "bias" in name or "adapter" in name:
                parameter.normal_(std=0.1)
        ids = torch.arange(9)[None]
        expected = biased(input_ids=ids).logits
        adapters.merge(biased)
        torch.testing.assert_close(biased(input_ids=ids).logits, expected, atol=1e-4, rtol=0)


def test_an_adapter_needs_a_gated_feed_forward_layer(chain: Chain) -> None:
    encoder = models.load_encoder(chain.path("data/pretrain/mlm/model"), NUMERICS)
    with pytest.raises(StageError, match=r"of this modernbert model are not gated ones with gate_proj, up_proj"):
        methods.apply(encoder, method(name="adapter", width=4))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "prefix"}, "'full', 'top', 'lora', 'qlora', 'adapter'"),
        ({"name": "lora", "rank": 4}, "alpha"),
        ({"name": "full", "rank": 4}, "Extra inputs"),
        ({"name": "top", "layers": 0}, "greater than or equal to 1"),
        ({**QLORA, "dora": True}, "Extra inputs"),
    ],
)
def test_an_unknown_method_is_told_with_the_choices(settings: dict[str, Any], sentence: str) -> None:
    """A method that does not exist, or another's setting, is an error that names what there is."""
    with pytest.raises(ValidationError, match=sentence):
        method(**settings)


def test_more_top_layers_than_there_are_is_told(model: Any) -> None:
    """The message holds both numbers."""
    with pytest.raises(StageError, match="layers is 5, but the model has 2 blocks"):
        methods.apply(model, method(name="top", layers=5))


def test_top_finds_the_blocks_of_other_builds() -> None:
    """GPT-2 calls them otherwise than Llama, and a model of a third kind is refused with a way out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **size))
    methods.apply(gpt2, method(name="top", layers=1))
    trained = {name for name, parameter in gpt2.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"h", "ln_f", "wte"}  # the head is tied to the embedding
    assert not any(".h.0." in name for name in trained)
    opt = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", **size, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)
    )
    with pytest.raises(StageError, match="and OPTForCausalLM has no such names: take full, or lora"):
        methods.apply(opt, method(name="top", layers=1))


def test_a_rank_over_the_width_is_told(model: Any) -> None:
    """Of a model that is given, and whose width no setting tells."""
    with pytest.raises(StageError, match="rank is 65, but the model's width is 64"):
        methods.apply(model, method(**{**LORA, "rank": 65}))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({**LORA, "rank": 193}, "rank: found 193, but it should be at most pretrain.clm.model.hidden, which is 192"),
        (QLORA, "name: found 'qlora', which needs numerics.device to be cuda (it is cpu)"),
    ],
    ids=["rank", "qlora"],
)
def test_what_cannot_be_trained_is_refused_before_anything_loads(settings: dict[str, Any], sentence: str) -> None:
    """One sentence with what was found and what it should be."""
    params = read_params(ROOT / "profiles/default.yaml")
    params["finetune"]["method"] = settings
    with pytest.raises(SettingsError) as failure:
        check(params)
    assert f"finetune.method.{sentence}" in str(failure.value)
    assert "has 1 problem;" in str(failure.value)


def test_four_bits_without_bitsandbytes_say_what_to_install(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"pip install -c requirements.lock -e '.\[qlora\]'"):
        methods.load_four_bit(chain.path("data/pretrain/clm/model"), method(**QLORA), "eager")


@pytest.mark.gpu
def test_qlora_trains_beside_four_bits_and_merges_into_full_precision(chain: Chain) -> None:
    """The merged weights are the full-precision ones plus the update, not four-bit ones taken back."""
    import torch

    path = chain.path("data/pretrain/clm/model")
    numerics = NUMERICS.model_copy(update={"device": "cuda"})
    settings = method(**QLORA)
    trained: Any = methods.apply(methods.load_four_bit(path, settings, "eager"), settings)
    name = "model.layers.0.mlp.up_proj"
    layer: Any = trained.base_model.model.get_submodule(name)
    assert type(layer.base_layer).__name__ == "Linear4bit"
    layer.lora_B["default"].weight.data.normal_(std=0.1)
    update = 2.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().cpu()
    merged = methods.merge(trained, settings, lambda: models.load_decoder(path, numerics))
    found = weight_of(merged, name)
    torch.testing.assert_close(found, weights(path)[f"{name}.weight"] + update, atol=1e-4, rtol=0)
    assert found.dtype == torch.float32
