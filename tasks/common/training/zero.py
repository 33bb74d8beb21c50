"""ZeRO by DeepSpeed (`pip install -c requirements.lock deepspeed`): the engines `zero2` and `zero3`.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models": stage 2 shards
optimizer state and gradients, stage 3 the weights too. DeepSpeed concatenates the flattened weights of a parameter
group and gives each process one partition, so only elementwise update rules work.
"""

import logging
import math
import warnings
from typing import TYPE_CHECKING, Any

from tasks.common.settings import ZERO_STAGES
from tasks.common.training import optimizers
from tasks.common.training.checkpoints import Checkpoint
from tasks.common.training.optimizers import Optimizer
from tasks.common.training.parallel import BUCKET_NUMEL, World

if TYPE_CHECKING:
    import torch


class ZeroEngine:
    """DeepSpeed's engine around one optimizer; implements `updates.TrainEngine`."""

    def __init__(self, config: Optimizer, model: "torch.nn.Module", world: World) -> None:
        (optimizer,) = optimizers.build(config, model)
        self.model, self.world = model, world
        self.engine = _initialize_engine(model, optimizer, config.max_grad_norm, world)

    def backward(self, loss: "torch.Tensor") -> None:
        """Run the backward pass; DeepSpeed reduces each gradient to the process that owns the weight's partition."""
        # Else stage 3 drops earlier micro-batches; see `_initialize_engine`.
        self.engine.optimizer.clear_backward_seen_flag()
        self.engine.backward(self.world.loss_scale * loss, scale_wrt_gas=False)

    def step(self, losses: "torch.Tensor", learning_rate: float) -> list[float]:
        """Let DeepSpeed clip and step; if the norm is not finite, it does not change the weights."""
        metrics: list[float] = losses.tolist()
        if not all(map(math.isfinite, metrics)):
            return [*metrics, math.nan]
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return [*metrics, float(self.engine.get_global_grad_norm())]

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return the trained weights by their names in the model."""
        return self._gather_parameters({n: p for n, p in self.model.named_parameters() if p.requires_grad})

    def state(self) -> "tuple[dict[str, torch.Tensor], list[Any]]":
        """Return the optimizer's tensors under `partition.name`, concatenated over processes, and its counters."""
        tensors: dict[str, torch.Tensor] = {}
        for number, partition in enumerate(self._flat_partitions()):
            for name, value in sorted(self._optimizer_state()[partition].items()):
                tensors[f"{number}.{name}"] = self._all_gather(value) if value.ndim else value
        return tensors, optimizers.step_counters(self.engine.optimizer)

    def load(self, checkpoint: Checkpoint) -> None:
        """Load this process's chunk of every flat partition."""
        partitions = self._flat_partitions()
        for path, value in checkpoint.moments.items():
            number, name = path.split(".", 1)
            partition = partitions[int(number)]
            chunk = value.chunk(self.world.size)[self.world.rank] if value.ndim else value
            self._optimizer_state()[partition][name] = chunk.clone().to(partition.device)
        for group, count in zip(self.engine.optimizer.param_groups, checkpoint.counters, strict=True):
            group.update(count)

    def gather_into(self, unsharded: "torch.nn.Module") -> None:
        """Gather the weights one at a time and load them into the unsharded model."""
        state = unsharded.state_dict()
        state |= self._gather_parameters(dict(self.model.named_parameters()))
        state |= {name: value for name, value in self.model.named_buffers() if name in state}
        unsharded.load_state_dict(state)
        self.engine.destroy()

    def _optimizer_state(self) -> Any:
        return self.engine.optimizer.optimizer.state

    def _flat_partitions(self) -> "list[torch.Tensor]":
        """Return this process's flat partition (n,) of each parameter group; n is equal in all processes."""
        zero = self.engine.optimizer
        partitions: list[torch.Tensor]
        if self.engine.zero_optimization_stage() == ZERO_STAGES["zero3"]:
            partitions = zero.fp32_partitioned_groups_flat
        else:
            partitions = zero.single_partition_of_fp32_groups
        return partitions

    def _all_gather(self, chunk: "torch.Tensor") -> "torch.Tensor":
        import torch

        chunks = [torch.empty_like(chunk) for _ in range(self.world.size)]
        torch.distributed.all_gather(chunks, chunk.contiguous())
        return torch.cat(chunks)

    def _gather_parameters(self, parameters: "dict[str, torch.nn.Parameter]") -> "dict[str, torch.Tensor]":
        import deepspeed

        gathered = {}
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters(parameter):
                gathered[name] = parameter.detach().clone()
        return gathered


def _initialize_engine(
    model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", max_grad_norm: float, world: World
) -> Any:
    """Return DeepSpeed's engine.

    Objectives call the model's forward and not the engine's, so `ZeroEngine.backward` does what that would prepare.
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # required; DeepSpeed uses it for counters only
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": ZERO_STAGES[world.engine],
            "reduce_bucket_size": BUCKET_NUMEL,
            "allgather_bucket_size": BUCKET_NUMEL,
            "stage3_prefetch_bucket_size": BUCKET_NUMEL,
        },
    }
    # Else the first process on a machine compiles it in C++, for a minute or two. Only DeepSpeed's inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine
