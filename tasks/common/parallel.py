"""Several processes that train one model: who reads which part of a batch, and how gradients and weights come together.

A launcher (`torchrun`, `accelerate launch`, or the stage, which becomes torchrun where `numerics.parallel` asks for
several) gives each process its rank. `data` keeps the whole model in each and adds their gradients up; `fsdp` shares
weights, gradients and the optimizer's state out (Zhao et al. 2023, in the form of torch's `fully_shard`).
"""

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.common.settings import Numerics
from tasks.common.stage import StageError, rank

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound="torch.nn.Module")


@dataclass(frozen=True)
class World:
    """The processes that train together; in a world of one, nothing here does anything."""

    rank: int
    size: int
    sharded: bool
    device: str

    @classmethod
    def join(cls, numerics: Numerics) -> "World":
        """Meet the other processes; raise StageError where a launcher started another number than the settings say."""
        import torch

        parallel, size = numerics.parallel, int(os.environ.get("WORLD_SIZE", "1"))
        if size != parallel.processes:
            raise StageError(
                f"{size} processes were started, but numerics.parallel.processes is {parallel.processes}: make them "
                "equal. The number is part of the model's identity, because it changes the order of sums."
            )
        if size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if numerics.device == "cuda" else "gloo")
        return cls(rank(), size, size > 1 and parallel.engine == "fsdp", numerics.device)

    def spread(self, model: Model) -> Model:
        """Make a model that the processes train together, in place, and return what its end is to be loaded into.

        Each block is gathered when it is needed and given up again afterwards.
        """
        if not self.sharded:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        plain, mesh = copy.deepcopy(model), init_device_mesh(self.device, (self.size,))
        for module in list(model.modules()):
            if type(module).__name__.endswith(("DecoderLayer", "EncoderLayer")):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return plain

    def add_up(self, model: "torch.nn.Module") -> None:
        """Give every process the sum of all gradients; sharded models have theirs already."""
        import torch

        if self.size > 1 and not self.sharded:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    torch.distributed.all_reduce(parameter.grad)

    @property
    def scale(self) -> float:
        """Return what a loss is multiplied with, because `fully_shard` divides gradients by the number of processes."""
        return float(self.size) if self.sharded else 1.0

    def sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the sum of all processes' values."""
        import torch

        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def decide(self, choice: bool) -> bool:
        """Return the first process's choice, which all then make."""
        import torch

        if self.size == 1:
            return choice
        told = torch.tensor([int(choice)], device=self.device)
        torch.distributed.broadcast(told, 0)
        return bool(told.item())

    def leave(self) -> None:
        """Part from the others once all are done; all but the first end here, for what follows is done once."""
        import torch

        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if self.rank:
            raise SystemExit(0)


def whole(tensor: Any) -> Any:
    """Return a tensor that is shared out among processes in one piece; all of them must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed_like(tensor: "torch.Tensor", other: Any) -> "torch.Tensor":
    """Return a tensor shared out as another of its shape is."""
    if not hasattr(other, "full_tensor") or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: torch.Tensor = distribute_tensor(
        tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )
    return placed
