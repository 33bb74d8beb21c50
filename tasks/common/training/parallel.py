"""Distributed training of one model: which process reads which rows, and how gradients and weights are combined.

A launcher (`torchrun`, `accelerate launch`, or the stage itself, which runs torchrun if `numerics.parallel.processes`
is above 1) gives each process its rank. Engines: `data` replicates the model and all-reduces gradients; `fsdp` shards
weights, gradients and optimizer state (Zhao et al. 2023, as torch's `fully_shard`); `tensor` splits every matrix, and
all processes read the same batch (`tensor_parallel.py`); `zero2` and `zero3` are DeepSpeed's (`zero.py`).
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.common.harness.launch import rank
from tasks.common.settings import LOCKSTEP_ENGINES, ZERO_STAGES, Numerics
from tasks.common.training import tensor_parallel

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound="torch.nn.Module")

BUCKET_NUMEL = 2**25  # elements per communication bucket


@dataclass(frozen=True)
class World:
    """The processes that train together; with one process no method communicates."""

    rank: int
    size: int
    engine: str
    device: str

    @classmethod
    def join(cls, numerics: Numerics) -> "World":
        """Join the process group that `numerics.parallel` asks for; without several processes there is none."""
        import torch

        parallel, size = numerics.parallel, numerics.parallel.processes
        if size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if numerics.device == "cuda" else "gloo")
        return cls(rank(), size, parallel.engine if size > 1 else "data", numerics.device)

    @property
    def data_parallel_size(self) -> int:
        """The number of shards that a batch is read in; under `tensor` all processes read the same rows."""
        return 1 if self.engine == "tensor" else self.size

    @property
    def data_parallel_rank(self) -> int:
        """The index of the shard that this process reads."""
        return self.rank % self.data_parallel_size

    @property
    def lockstep(self) -> bool:
        """Whether all processes must run the same number of passes; see `Parallel.lockstep`."""
        return self.engine in LOCKSTEP_ENGINES

    def shard(self, model: Model) -> Model:
        """Shard a model in place and return an unsharded model, which `TrainEngine.gather_into` fills after training.

        Under `data` the returned model is the same object. Under `fsdp` each block is gathered before use and freed
        again afterwards. DeepSpeed shards the model later (`zero.py`). Raises StageError if the engine does not
        support the model.
        """
        if self.engine == "data":
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if self.engine == "tensor":
            tensor_parallel.check_divisible(model, self.size)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # it returned a view; no caller changes it in place
        unsharded = copy.deepcopy(model)
        if self.engine in ZERO_STAGES:
            return unsharded
        mesh = init_device_mesh(self.device, (self.size,))
        if self.engine == "tensor":
            tensor_parallel.parallelize(model, mesh)
            return unsharded
        for module in list(model.modules()):
            if type(module).__name__.endswith(("DecoderLayer", "EncoderLayer")):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return unsharded

    def all_reduce_grads(self, parameters: "Sequence[torch.nn.Parameter]") -> None:
        """Sum the gradients over all processes, in place; sharding engines have done that already."""
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
            flat = parameters_to_vector(bucket)
            torch.distributed.all_reduce(flat)
            vector_to_parameters(flat, bucket)

    @property
    def loss_scale(self) -> float:
        """The factor of a loss that undoes the engine's averaging: sharding engines divide gradients by the size."""
        return float(self.size) if self.lockstep else 1.0

    def sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the sum of the values over all shards of a batch (in place)."""
        import torch

        if self.data_parallel_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def max(self, number: int) -> int:
        """Return the maximum over processes if all must run the same number of passes, else this process's number."""
        import torch

        if not self.lockstep:
            return number
        value = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value.item())

    def gather_names(self, names: Sequence[str]) -> list[str]:
        """Return the row names of all processes' shards; a collective call."""
        import torch

        if self.data_parallel_size == 1:
            return list(names)
        encoded = torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(encoded)], device=self.device))
        longest = max(int(size) for size in sizes)
        gathered = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(gathered, torch.nn.functional.pad(encoded, (0, longest - len(encoded))))
        texts = (bytes(part[: int(size)].tolist()).decode() for part, size in zip(gathered, sizes, strict=True))
        return [name for text in texts for name in text.split("\n") if name]

    def broadcast(self, number: int) -> int:
        """Return the number of rank 0, so that all processes take the same decision."""
        import torch

        if self.size == 1:
            return number
        value = torch.tensor([number], device=self.device)
        torch.distributed.broadcast(value, 0)
        return int(value.item())

    def shutdown(self) -> None:
        """Wait for all processes and leave the group; all ranks but 0 exit here, so that only rank 0 writes outputs."""
        import torch

        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if self.rank:
            raise SystemExit(0)


def _buckets(tensors: "list[torch.Tensor]") -> "Iterator[list[torch.Tensor]]":
    """Yield the tensors in buckets of about `BUCKET_NUMEL` elements: one message per tensor takes six times as long."""
    bucket: list[torch.Tensor] = []
    numel = 0
    for tensor in tensors:
        bucket.append(tensor)
        numel += tensor.numel()
        if numel >= BUCKET_NUMEL:
            yield bucket
            bucket, numel = [], 0
    if bucket:
        yield bucket


def full_tensor(tensor: Any) -> Any:
    """Return a tensor unsharded; a collective call if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: "torch.Tensor", reference: Any) -> "torch.Tensor":
    """Return a tensor sharded like another one of the same shape."""
    if not hasattr(reference, "full_tensor") or tensor.shape != reference.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: torch.Tensor = distribute_tensor(
        tensor.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )
    return sharded
