"""Fine-tuning methods: each trains the right weights, merges into a plain model, and rejects unsupported models."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common.defaults import read_settings
from tasks.common.harness.job import StageError
from tasks.common.modelling import adapters, methods, models
from tasks.common.params_file import check
from tasks.common.settings import Dtypes, SettingsError
from tests.conftest import ROOT
from tests.training_fixtures import LORA, NUMERICS, QLORA, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain


@pytest.fixture
def model(chain: Chain) -> Any:
    """A fresh copy of the base decoder."""
    return models.load_decoder(chain.path("data/pretrain/causal/model"), NUMERICS)


def method(**settings: Any) -> Any:
    """Return a method's validated settings."""
    return config("finetune@chat", method=settings).method


def weights(path: Path) -> dict[str, Any]:
    """Return a saved model's tensors by name."""
    from safetensors.torch import load_file

    return dict(load_file(path / "model.safetensors"))


def weight_of(model: Any, name: str) -> Any:
    """Return a layer's matrix."""
    return model.get_submodule(name).weight.detach().cpu()


def before_and_after(settings: dict[str, Any], chain: Chain, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the base model's weights and those after a few steps of a method."""
    tiny = config("finetune@chat", method=settings, steps=4)
    job = chain.job("finetune@chat", tiny, folder)
    chain.run(job, tiny)
    return weights(chain.path("data/pretrain/causal/model")), weights(job.outputs["model"])


def changed_weights(settings: dict[str, Any], chain: Chain, folder: Path) -> dict[str, Any]:
    """Return the change of each of the base model's weights after a few steps of a method."""
    before, after = before_and_after(settings, chain, folder)
    assert set(before) == set(after)
    return {name: after[name] - before[name] for name in before}


def test_full_trains_every_weight(chain: Chain, tmp_path: Path) -> None:
    """Every weight of the model changes."""
    assert all(change.any() for change in changed_weights({"name": "full"}, chain, tmp_path).values())


def test_top_layers_leaves_lower_blocks_unchanged(chain: Chain, tmp_path: Path) -> None:
    """Only the last block, the final norm and the head (with the embeddings tied to it) change."""
    changes = changed_weights({"name": "top_layers", "layers": 1}, chain, tmp_path)
    moved = {name for name, change in changes.items() if change.any()}
    assert moved == {
        name for name in changes if name.startswith(("model.layers.1.", "model.norm.", "model.embed_tokens."))
    }


@pytest.mark.parametrize(("targets", "layers"), [("all-linear", "_proj"), ("attention", "self_attn.")])
def test_lora_adds_a_low_rank_to_linear_layers(targets: str, layers: str, chain: Chain, tmp_path: Path) -> None:
    """Each targeted linear layer changes by a matrix of at most the rank; no other weight changes."""
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
def test_lora_scale_matches_paper(changes: dict[str, Any], scale: float, model: Any) -> None:
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


def test_dora_trains_magnitudes_separately(model: Any) -> None:
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
def test_merged_model_gives_same_logits(settings: dict[str, Any], model: Any) -> None:
    """An untrained method does not change the logits; a trained one merges into a plain model with equal logits."""
    import torch

    ids = torch.arange(20)[None]
    chosen = method(**settings)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        trained: Any = methods.apply(model, chosen).eval()
        torch.testing.assert_close(trained(input_ids=ids).logits, plain, atol=2e-5, rtol=0)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "adapter.down_proj" in name):  # initialized to 0
                parameter.normal_(std=0.05, generator=generator)
        expected = trained(input_ids=ids).logits
        assert (expected - plain).abs().max() > 0.1
        merged = methods.merge(trained, chosen)
        logits = merged(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)  # sums of 96 float32 products in another order
    names = {name for name, _ in merged.named_parameters()}
    assert not any("lora" in name or "adapter" in name for name in names)
    assert type(merged).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_merged_gives_same_logits_and_restores_weights(dora: bool, model: Any) -> None:
    """Also if the body of the context raises."""
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
        with contextlib.suppress(KeyError), methods.adapters_merged(trained, chosen):
            torch.testing.assert_close(trained(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
            moved = [name for name, weight in trained.state_dict().items() if not weight.equal(before[name])]
            assert len(moved) == (0 if dora else 14)  # of each of two blocks: four of attention, three of feed-forward
            raise KeyError
        assert trained(input_ids=ids).logits.equal(expected)
    assert all(weight.equal(before[name]) for name, weight in trained.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"targets": "attention", "dropout": 0.2}], ids=["all-linear", "attention"])
def test_bfloat16_frozen_weights_train_to_same_bytes(
    changes: dict[str, Any], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bfloat16 products, casting frozen weights in advance changes nothing; saved weights are float32."""
    import torch

    numerics = NUMERICS.model_copy(update={"dtype": Dtypes(decoder="bfloat16", encoder="float32")})
    tiny = config("finetune@chat", method={**LORA, **changes}, steps=4)
    jobs = [chain.job("finetune@chat", tiny, tmp_path / name, numerics=numerics) for name in ("two", "four")]
    seen: list[set[Any]] = []
    store = methods.cast_frozen_to_bfloat16

    def record_dtypes(model: Any, *parts: Any) -> None:
        store(model, *parts)
        seen.append({parameter.dtype for parameter in model.parameters() if not parameter.requires_grad})

    monkeypatch.setattr(methods, "cast_frozen_to_bfloat16", record_dtypes)
    chain.run(jobs[0], tiny)
    assert seen == [{torch.float32, torch.bfloat16}]
    monkeypatch.setattr(methods, "cast_frozen_to_bfloat16", lambda *_: None)
    chain.run(jobs[1], tiny)
    two, four = (weights(job.outputs["model"]) for job in jobs)
    assert {tensor.dtype for tensor in two.values()} == {torch.float32}
    assert all(two[name].equal(four[name]) for name in four)


def test_merged_adapter_adds_neurons(chain: Chain, tmp_path: Path) -> None:
    """The saved folder loads as a plain model with wider feed-forward layers; the old neurons do not change."""
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
    """In a gated layer with biases, input biases are concatenated and output biases added."""
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
    encoder = models.load_encoder(chain.path("data/pretrain/masked/model"), NUMERICS)
    with pytest.raises(StageError, match=r"with gate_proj, up_proj, .* of this modernbert model"):
        methods.apply(encoder, method(name="adapter", width=4))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "prefix"}, "'full', 'top_layers', 'lora', 'qlora', 'adapter'"),
        ({"name": "top_layers"}, "layers"),
        ({"name": "full", "rank": 4}, "Extra inputs"),
        ({"name": "top_layers", "layers": 0}, "greater than or equal to 1"),
        ({**QLORA, "dora": True}, "Extra inputs"),
    ],
)
def test_unknown_method_lists_choices(settings: dict[str, Any], sentence: str) -> None:
    """An unknown method, or a setting of another method, is an error that lists the choices."""
    with pytest.raises(ValidationError, match=sentence):
        method(**settings)


def test_too_many_top_layers_is_rejected(model: Any) -> None:
    """The message holds both numbers."""
    with pytest.raises(StageError, match="layers is 5, but the model has 2 blocks"):
        methods.apply(model, method(name="top_layers", layers=5))


def test_top_layers_supports_other_architectures() -> None:
    """GPT-2 and OPT have other attribute names than Llama; ALBERT shares one block and is rejected."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **size))
    methods.apply(gpt2, method(name="top_layers", layers=1))
    trained = {name for name, parameter in gpt2.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"h", "ln_f", "wte"}  # the head is tied to the embedding
    assert not any(".h.0." in name for name in trained)
    opt = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", **size, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)
    )
    methods.apply(opt, method(name="top_layers", layers=1))
    trained = {name for name, parameter in opt.named_parameters() if parameter.requires_grad}
    assert any(".layers.1." in name for name in trained)
    assert not any(".layers.0." in name for name in trained)
    albert = AutoModelForMaskedLM.from_config(AutoConfig.for_model("albert", **size, intermediate_size=48))
    with pytest.raises(StageError, match="one list of blocks, and AlbertForMaskedLM has none: use full or lora"):
        methods.apply(albert, method(name="top_layers", layers=1))


def test_rank_above_width_is_rejected(model: Any) -> None:
    """For an existing model, whose width is not in the settings."""
    with pytest.raises(StageError, match="rank is 65, but the model's width is 64"):
        methods.apply(model, method(**{**LORA, "rank": 65}))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({**LORA, "rank": 193}, "rank: found 193, but it should be at most pretrain.causal.model.hidden, which is 192"),
        (QLORA, "name: found 'qlora', which needs numerics.device to be cuda (it is cpu)"),
    ],
    ids=["rank", "qlora"],
)
def test_untrainable_method_is_rejected_before_loading(settings: dict[str, Any], sentence: str) -> None:
    """The message has the value found and the value expected."""
    params = read_settings(ROOT / "profiles/default.yaml")
    params["finetune"]["chat"]["method"] = settings
    with pytest.raises(SettingsError) as failure:
        check(params)
    assert f"finetune.chat.method.{sentence}" in str(failure.value)
    assert "has 1 problem;" in str(failure.value)


def test_missing_bitsandbytes_message_says_what_to_install(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"pip install -c requirements.lock bitsandbytes"):
        methods.load_four_bit(chain.path("data/pretrain/causal/model"), method(**QLORA), "eager")


@pytest.mark.gpu
def test_qlora_merges_into_full_precision(chain: Chain) -> None:
    """The merged weights are the full-precision ones plus the update, not dequantized four-bit ones."""
    import torch

    path = chain.path("data/pretrain/causal/model")
    numerics = NUMERICS.model_copy(update={"device": "cuda"})
    settings = method(**QLORA)
    trained: Any = methods.apply(methods.load_four_bit(path, settings, "eager"), settings)
    name = "model.layers.0.mlp.up_proj"
    layer: Any = trained.base_model.model.get_submodule(name)
    assert type(layer.base_layer).__name__ == "Linear4bit"
    layer.lora_B["default"].weight.data.normal_(std=0.1)
    update = 2.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().cpu()
    merged = methods.merge(trained, settings, lambda: models.load_decoder(path, numerics))
    weight = weight_of(merged, name)
    torch.testing.assert_close(weight, weights(path)[f"{name}.weight"] + update, atol=1e-4, rtol=0)
    assert weight.dtype == torch.float32
