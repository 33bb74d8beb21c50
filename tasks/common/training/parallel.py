"""Several processes that train one model: who reads which part of a batch, and how gradients and weights come together.

A launcher (`torchrun`, `accelerate launch`, or the stage, which becomes torchrun where `numerics.parallel` asks for
several) gives each process its rank. `data` keeps the whole model in each and adds their gradients up; `fsdp` shares
weights, gradients and the optimizer's state out (Zhao et al. 2023, in the form of torch's `fully_shard`); `tensor` cuts
every matrix, and all processes read the same (`tensor_parallel.py`).
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.common.settings import IN_STEP, ZERO, Numerics
from tasks.common.stage import rank
from tasks.common.training import tensor_parallel

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound="torch.nn.Module")

BUCKET = 2**25  # numbers that are sent at once


@dataclass(frozen=True)
class World:
    """The processes that train together; in a world of one, nothing here does anything."""

    rank: int
    size: int
    engine: str
    device: str

    @classmethod
    def join(cls, numerics: Numerics) -> "World":
        """Meet the other processes that `numerics.parallel` asks for."""
        import torch

        parallel, size = numerics.parallel, numerics.parallel.processes
        if size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if numerics.device == "cuda" else "gloo")
        return cls(rank(), size, parallel.engine if size > 1 else "data", numerics.device)

    @property
    def readers(self) -> int:
        """In how many shares a batch is read; cut by their matrices, all processes read the same one."""
        return 1 if self.engine == "tensor" else self.size

    @property
    def reader(self) -> int:
        """Return which of the shares this process reads."""
        return self.rank % self.readers

    @property
    def in_step(self) -> bool:
        """Whether all processes must make as many passes; see `Parallel.in_step`."""
        return self.engine in IN_STEP

    def spread(self, model: Model) -> Model:
        """Make a model that the processes train together, in place, and return what its end is to be loaded into.

        Under `fsdp` each block is gathered when it is needed and given up again afterwards. What DeepSpeed shares out
        is left to it (`zero.py`). Raises StageError where the engine cannot share such a model out.
        """
        if self.engine == "data":
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if self.engine == "tensor":
            tensor_parallel.must_divide(model, self.size)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returned a view, which nobody changes in place
        plain = copy.deepcopy(model)
        if self.engine in ZERO:
            return plain
        mesh = init_device_mesh(self.device, (self.size,))
        if self.engine == "tensor":
            tensor_parallel.parallelize(model, mesh)
            return plain
        for module in list(model.modules()):
            if type(module).__name__.endswith(("DecoderLayer", "EncoderLayer")):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return plain

    def add_up(self, parameters: "Sequence[torch.nn.Parameter]") -> None:
        """Give every process the sum of all gradients; models that are shared out have theirs already."""
        import torch
        from torch.nn.utils import parameters_to_vector, vector_to_parameters

        if self.size == 1 or self.engine != "data":
            return
        gradients: list[torch.Tensor] = []
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            sent = parameters_to_vector(bucket)
            torch.distributed.all_reduce(sent)
            vector_to_parameters(sent, bucket)

    @property
    def scale(self) -> float:
        """Return what a loss is multiplied with, because sharding engines divide gradients by the processes."""
        return float(self.size) if self.in_step else 1.0

    def sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the sum of the values of all shares of a batch."""
        import torch

        if self.readers > 1:
            torch.distributed.all_reduce(values)
        return values

    def most(self, number: int) -> int:
        """Return the largest of the processes' numbers where they must make as many passes, else this one's."""
        import torch

        if not self.in_step:
            return number
        found = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found.item())

    def names(self, read: Sequence[str]) -> list[str]:
        """Return what the processes have read together, by its names; all of them must ask."""
        import torch

        if self.readers == 1:
            return list(read)
        told = torch.tensor(list("\n".join(read).encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(told)], device=self.device))
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(parts, torch.nn.functional.pad(told, (0, longest - len(told))))
        found = (bytes(part[: int(size)].tolist()).decode() for part, size in zip(parts, sizes, strict=True))
        return [name for text in found for name in text.split("\n") if name]

    def told(self, number: int) -> int:
        """Return the first process's number, on which all then act."""
        import torch

        if self.size == 1:
            return number
        told = torch.tensor([number], device=self.device)
        torch.distributed.broadcast(told, 0)
        return int(told.item())

    def leave(self) -> None:
        """Part from the others once all are done; all but the first end here, for what follows is done once."""
        import torch

        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if self.rank:
            raise SystemExit(0)


def _buckets(tensors: "list[torch.Tensor]") -> "Iterator[list[torch.Tensor]]":
    """Yield the tensors in groups of about `BUCKET` numbers: a message of its own for each costs six times as much."""
    bucket: list[torch.Tensor] = []
    numbers = 0
    for tensor in tensors:
        bucket.append(tensor)
        numbers += tensor.numel()
        if numbers >= BUCKET:
            yield bucket
            bucket, numbers = [], 0
    if bucket:
        yield bucket


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
