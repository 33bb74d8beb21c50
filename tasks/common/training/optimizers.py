"""Optimizers and learning-rate schedules by name: their settings, and the torch objects made of them.

From torch: SGD with momentum, Adam, AdamW, Adafactor (Shazeer & Stern 2018) and Muon (Jordan et al. 2024). From
`pytorch_optimizer`: Lion (Chen et al. 2023). Written here: LAMB, whose ready-made versions leave out the paper's bias
correction (`lamb.py`).
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.common.modelling.models import HEADS
from tasks.common.settings import Settings
from tasks.common.training.lamb import lamb

if TYPE_CHECKING:
    import torch

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Beta], Field(min_length=2, max_length=2)]


class _Schedule(Settings):
    """The part that schedules share."""

    warmup: float = Field(description="Share of the steps in which the rate rises from 0", ge=0, le=0.5)


class Constant(_Schedule):
    """The peak rate until the end."""

    name: Literal["constant"] = Field(description="Schedule")


class Linear(_Schedule):
    """A straight line from the peak down to the floor."""

    name: Literal["linear"] = Field(description="Schedule")
    floor: float = Field(description="Rate at the end, as a share of the peak", ge=0, le=1)


class Cosine(_Schedule):
    """Half a cosine from the peak down to the floor (Loshchilov & Hutter 2017, equation 5, one cycle)."""

    name: Literal["cosine"] = Field(description="Schedule")
    floor: float = Field(description="Rate at the end, as a share of the peak", ge=0, le=1)


class WarmupStableDecay(_Schedule):
    """The peak rate, then in the last steps a straight line down to the floor (Hu et al. 2024, "MiniCPM")."""

    name: Literal["wsd"] = Field(description="Schedule")
    decay: float = Field(description="Share of the steps in which the rate falls, at the end", gt=0, le=0.5)
    floor: float = Field(description="Rate at the end, as a share of the peak", ge=0, le=1)


Schedule = Annotated[Constant | Linear | Cosine | WarmupStableDecay, Field(discriminator="name")]


class _Rule(Settings):
    """The part that update rules share."""

    learning_rate: float = Field(description="Peak learning rate", gt=0, le=10)
    weight_decay: float = Field(
        description="Decay of matrices, of which a step takes away this times the learning rate (sgd and adam add it "
        "to the gradient instead); norms, biases and embeddings have none",
        ge=0, le=100,
    )  # fmt: skip
    clip: float = Field(description="Largest norm of the gradient; longer ones are scaled down to it", gt=0)
    schedule: Schedule


class Sgd(_Rule):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013; plain at momentum 0)."""

    name: Literal["sgd"] = Field(description="Update rule")
    momentum: Beta = Field(description="Share of the last update that goes into the next")
    nesterov: bool = Field(description="Look ahead along the momentum")

    @model_validator(mode="after")
    def _looks_along_something(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum, which is 0: set it to false, or give a momentum")
        return self


class _Moments(_Rule):
    betas: Betas = Field(description="Memory of the gradient's mean and of its square's")
    epsilon: float = Field(description="Added to the root of the second moment", gt=0, le=1)


class Adam(_Moments):
    """Adam (Kingma & Ba 2015); the decay is added to the gradient."""

    name: Literal["adam"] = Field(description="Update rule")


class AdamW(_Moments):
    """Adam with decoupled decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = Field(description="Update rule")


class Lamb(_Moments):
    """Adam's update at the length of each layer's weights, for large batches (You et al. 2020, algorithm 2)."""

    name: Literal["lamb"] = Field(description="Update rule")


class Muon(_Moments):
    """Orthogonalized momentum for the hidden matrices (Jordan et al. 2024), AdamW for all else, at one rate."""

    name: Literal["muon"] = Field(description="Update rule")
    momentum: Beta = Field(description="Memory of the gradient's mean, for hidden matrices")


class Lion(_Rule):
    """The sign of an interpolated momentum (Chen et al. 2023, algorithm 2); a tenth of AdamW's rate is a start."""

    name: Literal["lion"] = Field(description="Update rule")
    betas: Betas = Field(description="Weight of the momentum in the update, and the momentum's memory")


class Adafactor(_Rule):
    """Second moments by row and column only (Shazeer & Stern 2018, algorithm 4): almost no memory of its own.

    Torch's form takes the smaller of the schedule's rate and 1/sqrt(t) at step t (algorithm 4's relative step).
    """

    name: Literal["adafactor"] = Field(description="Update rule")
    threshold: float = Field(description="d: largest root mean square of an update; longer ones are scaled", gt=0)


Optimizer = Annotated[Sgd | Adam | AdamW | Lamb | Muon | Lion | Adafactor, Field(discriminator="name")]


def rate_at(optimizer: _Rule, step: int, steps: int) -> float:
    """Return the learning rate of a step (0-based) of so many: a linear warm-up, then the schedule."""
    schedule, peak = optimizer.schedule, optimizer.learning_rate
    warmup = max(1, round(schedule.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    if isinstance(schedule, Constant):
        return peak
    falling = max(1, round(schedule.decay * steps) if isinstance(schedule, WarmupStableDecay) else steps - warmup)
    done = max(0.0, (step - (steps - falling)) / falling)
    remaining = (1 + math.cos(math.pi * done)) / 2 if isinstance(schedule, Cosine) else 1 - done
    return peak * (schedule.floor + (1 - schedule.floor) * remaining)


def build(config: _Rule, model: "torch.nn.Module") -> "list[torch.optim.Optimizer]":
    """Return the optimizers over a model's trainable parameters; several only where a rule leaves some to another."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(config, Muon):
        return _muon(config, model, trainable)
    made = groups(config, model, trainable)
    if isinstance(config, Sgd):
        return [torch.optim.SGD(made, config.learning_rate, config.momentum, nesterov=config.nesterov)]
    if isinstance(config, Lamb):
        return [lamb(made, config.learning_rate, config.betas, config.epsilon)]
    if isinstance(config, Lion):
        from pytorch_optimizer import Lion as Signs

        return [Signs(made, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), weight_decouple=True)]
    if isinstance(config, Adafactor):
        return [torch.optim.Adafactor(made, lr=config.learning_rate, d=config.threshold)]
    return [_adam(config, made)]


def groups(config: _Rule, model: "torch.nn.Module", parameters: "list[torch.nn.Parameter]") -> list[dict[str, Any]]:
    """Return the parameter groups: matrices, which decay, and norms, biases and embeddings, which do not."""
    import torch

    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decaying = [p for p in parameters if p.ndim >= 2 and id(p) not in looked_up]
    inside = {id(p) for p in decaying}
    found = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in inside], "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def counters(optimizer: "torch.optim.Optimizer") -> list[dict[str, int]]:
    """Return what an optimizer counts in its groups: some keep the number of steps there and not beside the weights."""
    return [{"step": group["step"]} if "step" in group else {} for group in optimizer.param_groups]


def _muon(
    config: Muon, model: "torch.nn.Module", trainable: "list[torch.nn.Parameter]"
) -> "list[torch.optim.Optimizer]":
    """Return Muon over the hidden matrices and AdamW over the others; of low-rank updates, or a head, one has none."""
    import torch

    outer = _outer(model)
    hidden = [p for p in trainable if p.ndim == 2 and min(p.shape) > 1 and id(p) not in outer]
    inside = {id(p) for p in hidden}
    rest = AdamW(name="adamw", **config.model_dump(exclude={"name", "momentum"}))
    others = groups(rest, model, [p for p in trainable if id(p) not in inside])
    found: list[torch.optim.Optimizer] = []
    if hidden:
        found.append(
            torch.optim.Muon(
                hidden, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    return [*found, *([_adam(rest, others)] if others else [])]


def _adam(config: _Rule, made: list[dict[str, Any]]) -> "torch.optim.Optimizer":
    import torch

    assert isinstance(config, _Moments)
    kind = torch.optim.Adam if isinstance(config, Adam) else torch.optim.AdamW
    return kind(made, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), eps=config.epsilon, fused=True)


def _outer(model: "torch.nn.Module") -> set[int]:
    """Return the ids of the matrices that are not hidden, on any submodule: embeddings and heads, fresh ones too."""
    import torch
    from transformers import PreTrainedModel

    found = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not set(HEADS).isdisjoint(name.split(".")):
            found.add(id(module.weight))
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        if head is not None:
            found.add(id(head.weight))
    return found
