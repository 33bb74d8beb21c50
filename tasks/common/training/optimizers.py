"""Optimizers and learning-rate schedules by name: their settings, and the torch optimizers built from them.

From torch: SGD with momentum, Adam, AdamW, Adafactor (Shazeer & Stern 2018) and Muon (Jordan et al. 2024). From
`pytorch_optimizer`: Lion (Chen et al. 2023). Implemented here: LAMB (`lamb.py`), because published implementations omit
the paper's bias correction.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.common.modelling.head_models import HEAD_NAMES
from tasks.common.settings import Settings
from tasks.common.training.lamb import lamb

if TYPE_CHECKING:
    import torch

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Beta], Field(min_length=2, max_length=2)]


class _Schedule(Settings):
    """Settings that all schedules share."""

    warmup: float = Field(
        default=0.05, description="Share of the steps in which the rate rises linearly from 0", ge=0, le=0.5
    )


class Constant(_Schedule):
    """The peak rate until the last step."""

    name: Literal["constant"] = Field(description="Schedule")


class Linear(_Schedule):
    """A straight line from the peak down to the floor."""

    name: Literal["linear"] = Field(description="Schedule")
    floor: float = Field(default=0.0, description="Rate at the end, as a share of the peak", ge=0, le=1)


class Cosine(_Schedule):
    """Half a cosine from the peak down to the floor (Loshchilov & Hutter 2017, equation 5, one cycle)."""

    name: Literal["cosine"] = Field(description="Schedule")
    floor: float = Field(default=0.1, description="Rate at the end, as a share of the peak", ge=0, le=1)


class WarmupStableDecay(_Schedule):
    """The peak rate, then in the last steps a straight line down to the floor (Hu et al. 2024, "MiniCPM")."""

    name: Literal["wsd"] = Field(description="Schedule")
    decay: float = Field(
        default=0.1, description="Share of the steps, at the end, in which the rate falls", gt=0, le=0.5
    )
    floor: float = Field(default=0.0, description="Rate at the end, as a share of the peak", ge=0, le=1)


Schedule = Annotated[
    Constant | Linear | Cosine | WarmupStableDecay,
    Field(discriminator="name", description="Learning rate over the steps"),
]


class _UpdateRule(Settings):
    """Settings that all optimizers share."""

    learning_rate: float = Field(description="Peak learning rate", gt=0, le=10)
    weight_decay: float = Field(
        default=0.01,
        description="Decoupled weight decay of matrices: a step subtracts learning rate × this × weight (sgd and adam "
        "add it to the gradient instead); norms, biases and embeddings do not decay",
        ge=0, le=100,
    )  # fmt: skip
    max_grad_norm: float = Field(
        default=1.0, description="Gradient clipping: largest global norm of the gradient", gt=0
    )
    schedule: Schedule = Cosine(name="cosine")


class Sgd(_UpdateRule):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013; plain at momentum 0)."""

    name: Literal["sgd"] = Field(description="Update rule")
    momentum: Beta = Field(default=0.9, description="Momentum factor")
    nesterov: bool = Field(default=False, description="Use Nesterov momentum")

    @model_validator(mode="after")
    def _check_nesterov_momentum(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0 (found 0): set nesterov to false, or set a momentum")
        return self


class _AdamLike(_UpdateRule):
    betas: Betas = Field(
        default=[0.9, 0.98], description="Decay rates of the running means of the gradient and its square"
    )
    epsilon: float = Field(default=1e-9, description="Added to the square root of the second moment", gt=0, le=1)


class Adam(_AdamLike):
    """Adam (Kingma & Ba 2015); the decay is added to the gradient."""

    name: Literal["adam"] = Field(description="Update rule")
    betas: Betas = Field(
        default=[0.9, 0.999], description="Decay rates of the running means of the gradient and its square"
    )
    epsilon: float = Field(default=1e-8, description="Added to the square root of the second moment", gt=0, le=1)


class AdamW(_AdamLike):
    """Adam with decoupled decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = Field(description="Update rule")


class Lamb(_AdamLike):
    """Adam's update at the length of each layer's weights, for large batches (You et al. 2020, algorithm 2)."""

    name: Literal["lamb"] = Field(description="Update rule")
    betas: Betas = Field(
        default=[0.9, 0.999], description="Decay rates of the running means of the gradient and its square"
    )
    epsilon: float = Field(default=1e-6, description="Added to the square root of the second moment", gt=0, le=1)


class Muon(_AdamLike):
    """Orthogonalized momentum for hidden matrices (Jordan et al. 2024), AdamW for other weights, at one rate."""

    name: Literal["muon"] = Field(description="Update rule")
    momentum: Beta = Field(default=0.95, description="Momentum factor, for hidden matrices")


class Lion(_UpdateRule):
    """The sign of an interpolated momentum (Chen et al. 2023, algorithm 2); start with a tenth of AdamW's rate."""

    name: Literal["lion"] = Field(description="Update rule")
    betas: Betas = Field(
        default=[0.9, 0.99], description="Weight of the momentum in the update, and decay rate of the momentum"
    )


class Adafactor(_UpdateRule):
    """Factored second moments, by row and column (Shazeer & Stern 2018, algorithm 4): almost no optimizer memory.

    Torch's form takes the smaller of the schedule's rate and 1/sqrt(t) at step t (algorithm 4's relative step).
    """

    name: Literal["adafactor"] = Field(description="Update rule")
    threshold: float = Field(
        default=1.0, description="d: clipping threshold, the largest root mean square of an update", gt=0
    )


Optimizer = Annotated[
    Sgd | Adam | AdamW | Lamb | Muon | Lion | Adafactor, Field(discriminator="name", description="Update rule")
]


def learning_rate_at(optimizer: _UpdateRule, step: int, steps: int) -> float:
    """Return the learning rate of a step (0-based) of `steps`: linear warm-up, then the schedule."""
    schedule, peak = optimizer.schedule, optimizer.learning_rate
    warmup = max(1, round(schedule.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    if isinstance(schedule, Constant):
        return peak
    decay_steps = max(1, round(schedule.decay * steps) if isinstance(schedule, WarmupStableDecay) else steps - warmup)
    progress = max(0.0, (step - (steps - decay_steps)) / decay_steps)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if isinstance(schedule, Cosine) else 1 - progress
    return peak * (schedule.floor + (1 - schedule.floor) * remaining)


def build(config: _UpdateRule, model: "torch.nn.Module") -> "list[torch.optim.Optimizer]":
    """Return the optimizers over a model's trainable parameters: one, or two for Muon (AdamW takes the rest)."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(config, Muon):
        return _build_muon(config, model, trainable)
    groups = parameter_groups(config, model, trainable)
    if isinstance(config, Sgd):
        return [torch.optim.SGD(groups, config.learning_rate, config.momentum, nesterov=config.nesterov)]
    if isinstance(config, Lamb):
        return [lamb(groups, config.learning_rate, config.betas, config.epsilon)]
    if isinstance(config, Lion):
        from pytorch_optimizer import Lion as Signs

        return [Signs(groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), weight_decouple=True)]
    if isinstance(config, Adafactor):
        return [torch.optim.Adafactor(groups, lr=config.learning_rate, d=config.threshold)]
    return [_build_adam(config, groups)]


def parameter_groups(
    config: _UpdateRule, model: "torch.nn.Module", parameters: "list[torch.nn.Parameter]"
) -> list[dict[str, Any]]:
    """Return the parameter groups: matrices with weight decay; norms, biases and embeddings without."""
    import torch

    embedding_ids = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decaying = [p for p in parameters if p.ndim >= 2 and id(p) not in embedding_ids]
    decaying_ids = {id(p) for p in decaying}
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decaying_ids], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def step_counters(optimizer: "torch.optim.Optimizer") -> list[dict[str, int]]:
    """Return an optimizer's step counts by group: some optimizers store them there and not in the parameters' state."""
    return [{"step": group["step"]} if "step" in group else {} for group in optimizer.param_groups]


def _build_muon(
    config: Muon, model: "torch.nn.Module", trainable: "list[torch.nn.Parameter]"
) -> "list[torch.optim.Optimizer]":
    """Return Muon over hidden matrices and AdamW over other weights; one may be missing (low-rank updates, heads)."""
    import torch

    excluded = _embedding_and_head_ids(model)
    hidden = [p for p in trainable if p.ndim == 2 and min(p.shape) > 1 and id(p) not in excluded]
    hidden_ids = {id(p) for p in hidden}
    adamw = AdamW(name="adamw", **config.model_dump(exclude={"name", "momentum"}))
    rest_groups = parameter_groups(adamw, model, [p for p in trainable if id(p) not in hidden_ids])
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    return [*optimizers, *([_build_adam(adamw, rest_groups)] if rest_groups else [])]


def _build_adam(config: _UpdateRule, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
    import torch

    assert isinstance(config, _AdamLike)
    optimizer_class = torch.optim.Adam if isinstance(config, Adam) else torch.optim.AdamW
    betas = (config.betas[0], config.betas[1])
    return optimizer_class(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


def _embedding_and_head_ids(model: "torch.nn.Module") -> set[int]:
    """Return the ids of the embeddings' and heads' matrices on any submodule, including newly initialized heads."""
    import torch
    from transformers import PreTrainedModel

    ids = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not set(HEAD_NAMES).isdisjoint(name.split(".")):
            ids.add(id(module.weight))
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        if head is not None:
            ids.add(id(head.weight))
    return ids
