"""Optimizers and schedules against the formulas of their papers in plain Python."""

import math
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tasks.common.modelling import head_models, methods, models
from tasks.common.modelling.models import Shape
from tasks.common.training import optimizers
from tasks.common.training.optimizers import Optimizer, learning_rate_at
from tests.training_fixtures import BASE_OPTIMIZER, LORA, NUMERICS, OPTIMIZER_OPTIONS, SHAPE, Chain, chain

if TYPE_CHECKING:
    import torch

__all__ = ["chain"]

GRADIENTS = [1.0, -0.5, 2.0, 0.25, 0.0]


def settings(name: str = "adamw", **changes: Any) -> Optimizer:
    """Return settings of an optimizer, some of them changed."""
    config: Optimizer = TypeAdapter(Optimizer).validate_python(
        {"name": name, **BASE_OPTIMIZER, **OPTIMIZER_OPTIONS[name], **changes}
    )
    return config


# Schedules

WARMUP_AND_FLOOR = {"warmup": 0.2, "floor": 0.1}


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"name": "constant", "warmup": 0.2}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"name": "linear", **WARMUP_AND_FLOOR}, [0.5, 1.0, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]),
        (
            {"name": "cosine", **WARMUP_AND_FLOOR},
            [0.5, 1.0] + [0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(8)],
        ),
        ({"name": "wsd", "decay": 0.4, **WARMUP_AND_FLOOR}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ({"name": "wsd", "decay": 0.4, "warmup": 0.2, "floor": 0.0}, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_schedules(schedule: dict[str, Any], rates: list[float]) -> None:
    """Two of ten steps of warm-up, then the schedule down to its floor."""
    optimizer = settings(schedule=schedule, learning_rate=1.0)
    assert [learning_rate_at(optimizer, step, 10) for step in range(10)] == pytest.approx(rates)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_learning_rate_stays_between_zero_and_peak(name: str, steps: int) -> None:
    """In short and long runs, the first and the last step have a learning rate above 0."""
    shape = {"constant": {}, "wsd": {"floor": 0.0, "decay": 0.5}}.get(name, {"floor": 0.0})
    optimizer = settings(schedule={"name": name, "warmup": 0.1, **shape})
    rates = [learning_rate_at(optimizer, step, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(optimizer.learning_rate)
    assert min(rates) > 0


# Update rules


def plain_update(name: str, decay: float, rate: float, weight: float) -> float:
    """Return a matrix entry after the updates, computed by the papers' formulas in plain Python.

    Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2; Sutskever et al. 2013 in torch's form; You et
    al. 2020, algorithm 2, for a layer of one weight; Chen et al. 2023, algorithm 2.
    """
    first = second = 0.0
    for t, gradient in enumerate(GRADIENTS, 1):
        if name == "lion":
            direction = math.copysign(1, mixed) if (mixed := 0.9 * first + 0.1 * gradient) else 0.0
            weight -= rate * (direction + decay * weight)
            first = 0.99 * first + 0.01 * gradient
            continue
        if name in ("sgd", "adam"):
            gradient += decay * weight
        if name == "sgd":
            first = 0.9 * first + gradient
            weight -= rate * first
            continue
        first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient**2
        step = first / (1 - 0.9**t) / (math.sqrt(second / (1 - 0.98**t)) + 1e-9)
        if name == "lamb":
            step += decay * weight
            step *= abs(weight) / abs(step)
        if name == "adamw":
            step += decay * weight
        weight -= rate * step
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb", "lion"])
def test_optimizers_match_their_papers(name: str, decay: float) -> None:
    """Five updates of a matrix entry and of a bias, which does not decay, against `plain_update`."""
    import torch

    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, 0.7)
    torch.nn.init.constant_(layer.bias, 0.7)
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    config = settings(name, weight_decay=decay, learning_rate=0.05, **momentum)
    apply_gradients(layer, config, [torch.tensor(gradient) for gradient in GRADIENTS])
    assert layer.weight.item() == pytest.approx(plain_update(name, decay, 0.05, 0.7), rel=1e-5)
    assert layer.bias.item() == pytest.approx(plain_update(name, 0.0, 0.05, 0.7), rel=1e-5)


def apply_gradients(model: "torch.nn.Module", config: Optimizer, gradients: "list[torch.Tensor]") -> None:
    """Update a model with a sequence of gradients, the same for all parameters."""
    built = optimizers.build(config, model)
    for gradient in gradients:
        for parameter in model.parameters():
            parameter.grad = gradient.expand_as(parameter).clone()
        for optimizer in built:
            optimizer.step()


def test_nesterov_looks_ahead() -> None:
    """Two steps computed by hand."""
    import torch

    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 1.0)
    config = settings("sgd", momentum=0.9, nesterov=True, weight_decay=0.0, learning_rate=0.1)
    apply_gradients(layer, config, [torch.tensor(1.0)] * 2)
    assert layer.weight.item() == pytest.approx(1 - 0.1 * (1 + 0.9 * 1) - 0.1 * (1 + 0.9 * 1.9))


def test_lamb_update_norm_is_relative_to_weight_norm() -> None:
    """The norm of a layer's first update is learning rate × weight norm, whatever the gradient's scale."""
    import torch

    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(4, 4, bias=False)])
    before = [layer.weight.detach().clone() for layer in layers.children()]  # type: ignore[operator]
    optimizer = optimizers.build(settings("lamb", weight_decay=0.0, learning_rate=0.1), layers)[0]
    for scale, parameter in zip((1e-3, 1e3), layers.parameters(), strict=True):
        parameter.grad = scale * torch.randn_like(parameter)
    optimizer.step()
    for old, parameter in zip(before, layers.parameters(), strict=True):
        assert (parameter - old).norm().item() == pytest.approx(0.1 * old.norm().item(), rel=1e-4)


def test_muon_makes_hidden_updates_orthogonal() -> None:
    """Every singular value of a hidden matrix's first update is near rate × 0.2 × √(longer side); its bias is AdamW's.

    Five Newton–Schulz steps leave the singular values between about 0.7 and 1.2 (Jordan et al. 2024).
    """
    import torch

    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 32)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    built = optimizers.build(settings("muon", weight_decay=0.0, learning_rate=0.01), layer)
    layer.weight.grad, layer.bias.grad = torch.randn(32, 16), torch.ones(32)
    for optimizer in built:
        optimizer.step()
    singular = torch.linalg.svdvals(weight - layer.weight.detach()) / (0.01 * 0.2 * math.sqrt(32))
    assert singular.min().item() > 0.6
    assert singular.max().item() < 1.3
    assert (bias - layer.bias.detach()).tolist() == pytest.approx([0.01] * 32, rel=1e-4)


def test_adafactor_keeps_rows_and_columns_only() -> None:
    """The first update's root mean square is the relative step times that of the weights (section 8), clipped at d."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False)
    before = layer.weight.detach().clone()
    built = optimizers.build(settings("adafactor", weight_decay=0.0, learning_rate=0.01), layer)
    layer.weight.grad = torch.randn(32, 64)
    built[0].step()
    sizes = {name: tuple(value.shape) for name, value in built[0].state[layer.weight].items() if value.ndim}
    assert sorted(sizes.values()) == [(1, 64), (32, 1)]
    scale = before.square().mean().sqrt().item()
    moved = (layer.weight.detach() - before).square().mean().sqrt().item()
    assert moved == pytest.approx(0.01 * scale, rel=0.2)


# Groups


def test_frozen_weights_are_not_optimized() -> None:
    """Frozen weights are in no parameter group."""
    import torch

    layer = torch.nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    groups = optimizers.build(settings(), layer)[0].param_groups
    assert [parameter is layer.bias for group in groups for parameter in group["params"]] == [True]


@pytest.mark.parametrize("name", sorted(OPTIMIZER_OPTIONS))
@pytest.mark.parametrize("build", [models.new_decoder, models.new_encoder])
def test_norms_biases_and_embeddings_do_not_decay(name: str, build: Any, chain: Chain) -> None:
    """Every parameter belongs to exactly one optimizer, and only the matrices of blocks and heads decay."""
    model = build(Shape(**SHAPE), chain.tokenizer(), 64, NUMERICS)
    built = optimizers.build(settings(name, weight_decay=0.1), model)
    decay = {id(p): g["weight_decay"] for o in built for g in o.param_groups for p in g["params"]}
    names = {parameter_name: decay[id(parameter)] for parameter_name, parameter in model.named_parameters()}
    assert len(decay) == len(names)
    not_decayed = {parameter for parameter, value in names.items() if not value}
    assert not_decayed == {
        parameter for parameter in names if "norm" in parameter or "embed" in parameter or "bias" in parameter
    }


def test_muon_excludes_embeddings_and_heads(chain: Chain) -> None:
    """Muon updates hidden matrices; AdamW updates embeddings, tied head, norms, and a value head of one row."""
    import torch

    model = models.new_decoder(Shape(**SHAPE), chain.tokenizer(), 64, NUMERICS)
    both = torch.nn.ModuleList([model, torch.nn.Linear(64, 1)])
    muon, adamw = optimizers.build(settings("muon"), both)
    hidden = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    names = {name for name, parameter in both.named_parameters() if id(parameter) in hidden}
    assert names == {name for name, _ in both.named_parameters() if "proj" in name}
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(both.parameters())) - len(names)


@pytest.mark.parametrize(
    ("method", "rules"),
    [
        ({**LORA, "rank": 4}, ["Muon", "AdamW"]),
        ({**LORA, "rank": 1}, ["AdamW"]),
        ({"name": "adapter", "width": 4}, ["Muon", "AdamW"]),
        ({"name": "head", "layers": 1, "pooling": "model"}, ["AdamW"]),
    ],
    ids=["updates", "updates of rank 1", "adapter", "head"],
)
def test_muon_with_fine_tuning_methods(method: dict[str, Any], rules: list[str], chain: Chain) -> None:
    """AdamW updates a new head; an optimizer without parameters is not built."""
    labels = [str(label) for label in range(3)]
    with models.suppress_warnings("transformers"):
        model = head_models.load_classifier(chain.path("data/pretrain/causal/model"), NUMERICS, labels)
    trained = methods.apply(model, TypeAdapter(methods.Method).validate_python(method))
    built = optimizers.build(settings("muon"), trained)
    assert [type(optimizer).__name__ for optimizer in built] == rules
    optimized = [id(p) for optimizer in built for group in optimizer.param_groups for p in group["params"]]
    assert sorted(optimized) == sorted(id(p) for p in trained.parameters() if p.requires_grad)
    heads = {id(p) for name, p in trained.named_parameters() if "score" in name}
    assert heads.isdisjoint(optimized[: -sum(len(group["params"]) for group in built[-1].param_groups)])


# Settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "sofia"}, "'sgd', 'adam', 'adamw', 'lamb', 'muon', 'lion', 'adafactor'"),
        ({"schedule": {"name": "step"}}, "'constant', 'linear', 'cosine', 'wsd'"),
        ({"learning_rate": 0.0}, "greater than 0"),
        ({"momentum": 0.9}, "Extra inputs are not permitted"),
        ({"betas": [0.9]}, "at least 2 items"),
        ({"betas": [0.9, 1.0]}, "less than 1"),
    ],
)
def test_unknown_setting_lists_choices(changes: dict[str, Any], sentence: str) -> None:
    """The error message lists the valid names."""
    with pytest.raises(ValidationError, match=sentence):
        TypeAdapter(Optimizer).validate_python(
            {"name": "adamw", **BASE_OPTIMIZER, **OPTIMIZER_OPTIONS["adamw"], **changes}
        )


def test_nesterov_without_momentum_is_rejected() -> None:
    """Else torch would raise it with a traceback when the stage runs."""
    with pytest.raises(ValidationError, match="nesterov needs a momentum above 0"):
        settings("sgd", momentum=0.0, nesterov=True)
    settings("sgd", momentum=0.9, nesterov=True)
