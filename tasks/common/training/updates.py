"""What turns a step's gradients into new weights: the optimizers, over whatever engine shares the model out.

The training loop asks for a backward pass, a step, and what a checkpoint must hold. `Torch` is for weights that torch
itself shares out or leaves whole; DeepSpeed's engine is in `zero.py`.
"""

import math
from typing import TYPE_CHECKING, Any, Protocol

from tasks.common.settings import ZERO
from tasks.common.training import optimizers
from tasks.common.training.checkpoints import Checkpoint, trained_weights
from tasks.common.training.optimizers import Optimizer
from tasks.common.training.parallel import World, placed_like, whole

if TYPE_CHECKING:
    import torch


class Updates(Protocol):
    """The optimizers of a model in training."""

    def backward(self, loss: "torch.Tensor") -> None:
        """Add a loss's gradient to what the step has gathered so far."""
        ...

    def step(self, losses: "torch.Tensor", rate: float) -> list[float]:
        """Change the weights by the gathered gradient at a learning rate; return the losses and the gradient's norm.

        Where one of these is not a finite number, the weights stay as they are. The norm is that before clipping.
        """
        ...

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return the weights that are trained, each in one piece; all processes must ask."""
        ...

    def state(self) -> "tuple[dict[str, torch.Tensor], list[Any]]":
        """Return what the optimizers remember: tensors, each in one piece, and counters; all processes must ask."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up what the optimizers remembered at a checkpoint, whose weights the model already has."""
        ...

    def end(self, trained: "torch.nn.Module") -> None:
        """Load all weights into a plain model; all processes must ask."""
        ...


def begun(config: Optimizer, model: "torch.nn.Module", world: World) -> Updates:
    """Return the updates of a model under the engine of a world, which may cut the model in place."""
    if world.engine in ZERO:
        from tasks.common.training.zero import Zero

        return Zero(config, model, world)
    return Torch(config, model, world)


class Torch:
    """Torch's optimizers over a model's parameters, or over this process's parts of them."""

    def __init__(self, config: Optimizer, model: "torch.nn.Module", world: World) -> None:
        self.optimizers = optimizers.build(config, model)
        self.clip, self.model, self.world = config.clip, model, world
        self.parameters = list(model.parameters())  # walking through the modules takes a third of a millisecond

    def backward(self, loss: "torch.Tensor") -> None:
        """Add the gradient to the parameters'."""
        (self.world.scale * loss).backward()

    def step(self, losses: "torch.Tensor", rate: float) -> list[float]:
        """Sum gradients over the processes, clip them to the norm that the settings allow, and step."""
        import torch

        self.world.add_up(self.parameters)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip))
        figures: list[float] = torch.cat([losses, norm[None]]).tolist()
        if all(map(math.isfinite, figures)):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
        return figures

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return the trained weights by their names in the model."""
        return {name: whole(value) for name, value in trained_weights(self.model).items()}

    def state(self) -> "tuple[dict[str, torch.Tensor], list[Any]]":
        """Return the optimizers' tensors as `optimizer.parameter.name`, and what they count in their groups."""
        tensors: dict[str, torch.Tensor] = {}
        for number, optimizer in enumerate(self.optimizers):
            tensors |= _flatten(optimizer.state_dict(), f"{number}.")
        return tensors, [optimizers.counters(optimizer) for optimizer in self.optimizers]

    def load(self, checkpoint: Checkpoint) -> None:
        """Place the tensors as the parameters that they belong to are."""
        for number, (optimizer, groups) in enumerate(zip(self.optimizers, checkpoint.counters, strict=True)):
            optimizer.load_state_dict(_unflatten(optimizer, checkpoint.moments, f"{number}.", groups))

    def end(self, trained: "torch.nn.Module") -> None:
        """Put the parts together, where the plain model is another one."""
        if trained is not self.model:
            trained.load_state_dict({name: whole(value) for name, value in self.model.state_dict().items()})


def _flatten(state: dict[str, Any], prefix: str) -> dict[str, "torch.Tensor"]:
    import torch

    # Sorted, because all processes must ask for the pieces of the same tensor, and a loaded state has no order.
    slots = sorted((index, name) for index, values in state["state"].items() for name in values)
    return {f"{prefix}{index}.{name}": whole(torch.as_tensor(state["state"][index][name])) for index, name in slots}


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
            slots.setdefault(int(index), {})[name] = placed_like(value, parameters[int(index)])
    groups = [{**group, **count} for group, count in zip(state["param_groups"], counters, strict=True)]
    return {"state": slots, "param_groups": groups}
