"""Training engines: backward pass, optimizer step and optimizer state of a model, sharded or not.

`TorchEngine` is for replicated models and for those sharded by torch itself; DeepSpeed's engine is in `zero.py`.
"""

import math
from typing import TYPE_CHECKING, Any, Protocol

from tasks.common.settings import ZERO_STAGES
from tasks.common.training import optimizers
from tasks.common.training.checkpoints import Checkpoint, trainable_weights
from tasks.common.training.optimizers import Optimizer
from tasks.common.training.parallel import World, full_tensor, shard_like

if TYPE_CHECKING:
    import torch


class TrainEngine(Protocol):
    """The backward pass, the optimizers and their state of one model in training."""

    def backward(self, loss: "torch.Tensor") -> None:
        """Add a loss's gradient to the gradients accumulated in this step."""
        ...

    def step(self, losses: "torch.Tensor", learning_rate: float) -> list[float]:
        """Clip the gradients and update the weights at a learning rate; return the losses and the gradient norm.

        The norm is the one before clipping. If a loss or the norm is not finite, the weights do not change.
        """
        ...

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return the trainable weights by name, unsharded; a collective call."""
        ...

    def state(self) -> "tuple[dict[str, torch.Tensor], list[Any]]":
        """Return the optimizers' state: tensors by name, unsharded, and step counters; a collective call."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Load the optimizers' state from a checkpoint. Its weights must already be in the model."""
        ...

    def gather_into(self, unsharded: "torch.nn.Module") -> None:
        """Load all weights, unsharded, into the model that `World.shard` returned; a collective call."""
        ...


def make_engine(config: Optimizer, model: "torch.nn.Module", world: World) -> TrainEngine:
    """Return the training engine that a world asks for; DeepSpeed's shards the model in place."""
    if world.engine in ZERO_STAGES:
        from tasks.common.training.zero import ZeroEngine

        return ZeroEngine(config, model, world)
    return TorchEngine(config, model, world)


class TorchEngine:
    """Torch's optimizers over a model's parameters, or over this process's shards of them."""

    def __init__(self, config: Optimizer, model: "torch.nn.Module", world: World) -> None:
        self.optimizers = optimizers.build(config, model)
        self.max_grad_norm, self.model, self.world = config.max_grad_norm, model, world
        self.parameters = list(model.parameters())  # cached: `model.parameters()` takes 0.3 ms

    def backward(self, loss: "torch.Tensor") -> None:
        """Accumulate the gradient in the parameters' `grad`."""
        (self.world.loss_scale * loss).backward()

    def step(self, losses: "torch.Tensor", learning_rate: float) -> list[float]:
        """Sum gradients over the processes, clip them to `max_grad_norm`, and step."""
        import torch

        self.world.all_reduce_grads(self.parameters)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        metrics: list[float] = torch.cat([losses, norm[None]]).tolist()
        if all(map(math.isfinite, metrics)):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
                optimizer.zero_grad()
        return metrics

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return the trained weights by their names in the model."""
        return {name: full_tensor(value) for name, value in trainable_weights(self.model).items()}

    def state(self) -> "tuple[dict[str, torch.Tensor], list[Any]]":
        """Return the optimizers' tensors under `optimizer.parameter.name`, and the step counters of their groups."""
        tensors: dict[str, torch.Tensor] = {}
        for number, optimizer in enumerate(self.optimizers):
            tensors |= _flatten(optimizer.state_dict(), f"{number}.")
        return tensors, [optimizers.step_counters(optimizer) for optimizer in self.optimizers]

    def load(self, checkpoint: Checkpoint) -> None:
        """Load the optimizers' state, each tensor sharded like its parameter."""
        for number, (optimizer, groups) in enumerate(zip(self.optimizers, checkpoint.counters, strict=True)):
            optimizer.load_state_dict(_unflatten(optimizer, checkpoint.moments, f"{number}.", groups))

    def gather_into(self, unsharded: "torch.nn.Module") -> None:
        """Gather the weights, unless the model was not sharded."""
        if unsharded is not self.model:
            unsharded.load_state_dict({name: full_tensor(value) for name, value in self.model.state_dict().items()})


def _flatten(state: dict[str, Any], prefix: str) -> dict[str, "torch.Tensor"]:
    import torch

    # Sorted: `full_tensor` is a collective call that needs one order in all processes; a loaded state has none.
    slots = sorted((index, name) for index, values in state["state"].items() for name in values)
    return {
        f"{prefix}{index}.{name}": full_tensor(torch.as_tensor(state["state"][index][name])) for index, name in slots
    }


def _unflatten(
    optimizer: "torch.optim.Optimizer",
    tensors: dict[str, "torch.Tensor"],
    prefix: str,
    counters: "list[dict[str, int]]",
) -> dict[str, Any]:
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for path, value in tensors.items():
        if path.startswith(prefix):
            index, name = path.removeprefix(prefix).split(".", 1)
            slots.setdefault(int(index), {})[name] = shard_like(value, parameters[int(index)])
    groups = [{**group, **count} for group, count in zip(state["param_groups"], counters, strict=True)]
    return {"state": slots, "param_groups": groups}
