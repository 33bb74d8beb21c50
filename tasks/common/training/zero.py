"""ZeRO by DeepSpeed (`pip install -c requirements.lock -e '.[deepspeed]'`): the engines `zero2` and `zero3`.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models": stage 2 shares the
optimizer's state and the gradient out among the processes, stage 3 the weights too. DeepSpeed lays the weights of a
group end to end and gives each process a stretch, so an update rule must treat every number alone.
"""

import logging
import math
import warnings
from typing import TYPE_CHECKING, Any

from tasks.common.settings import ZERO
from tasks.common.training import optimizers
from tasks.common.training.checkpoints import Checkpoint
from tasks.common.training.optimizers import Optimizer
from tasks.common.training.parallel import BUCKET, World

if TYPE_CHECKING:
    import torch


class Zero:
    """DeepSpeed's engine around one optimizer; implements `updates.Updates`."""

    def __init__(self, config: Optimizer, model: "torch.nn.Module", world: World) -> None:
        (optimizer,) = optimizers.build(config, model)
        self.model, self.world = model, world
        self.engine = _engine(model, optimizer, config.clip, world)

    def backward(self, loss: "torch.Tensor") -> None:
        """Send each gradient, as it is found, to the process that updates its weight."""
        self.engine.optimizer.clear_backward_seen_flag()  # else stage 3 forgets the parts before; see `_engine`
        self.engine.backward(self.world.scale * loss, scale_wrt_gas=False)

    def step(self, losses: "torch.Tensor", rate: float) -> list[float]:
        """Let DeepSpeed clip and step; where the norm is no finite number, it leaves the weights as they are."""
        figures: list[float] = losses.tolist()
        if not all(map(math.isfinite, figures)):
            return [*figures, math.nan]
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        return [*figures, float(self.engine.get_global_grad_norm())]

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return the trained weights by their names in the model."""
        return self._gathered({n: p for n, p in self.model.named_parameters() if p.requires_grad})

    def state(self) -> "tuple[dict[str, torch.Tensor], list[Any]]":
        """Return the optimizer's tensors as `stretch.name`, those of all processes end to end, and what it counts."""
        tensors: dict[str, torch.Tensor] = {}
        for number, stretch in enumerate(self._stretches()):
            for name, value in sorted(self._memory()[stretch].items()):
                tensors[f"{number}.{name}"] = self._end_to_end(value) if value.ndim else value
        return tensors, optimizers.counters(self.engine.optimizer)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take this process's part of every stretch."""
        stretches = self._stretches()
        for path, value in checkpoint.moments.items():
            number, name = path.split(".", 1)
            stretch = stretches[int(number)]
            mine = value.chunk(self.world.size)[self.world.rank] if value.ndim else value
            self._memory()[stretch][name] = mine.clone().to(stretch.device)
        for group, count in zip(self.engine.optimizer.param_groups, checkpoint.counters, strict=True):
            group.update(count)

    def end(self, trained: "torch.nn.Module") -> None:
        """Gather all weights into the plain model, one after the other."""
        state = trained.state_dict()
        state |= self._gathered(dict(self.model.named_parameters()))
        state |= {name: value for name, value in self.model.named_buffers() if name in state}
        trained.load_state_dict(state)
        self.engine.destroy()

    def _memory(self) -> Any:
        return self.engine.optimizer.optimizer.state

    def _stretches(self) -> "list[torch.Tensor]":
        """Return this process's part of every group of weights, flat (n,), all parts of a group of one length."""
        zero, third = self.engine.optimizer, self.engine.zero_optimization_stage() == ZERO["zero3"]
        found: list[torch.Tensor] = zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups
        return found

    def _end_to_end(self, part: "torch.Tensor") -> "torch.Tensor":
        import torch

        parts = [torch.empty_like(part) for _ in range(self.world.size)]
        torch.distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def _gathered(self, parameters: "dict[str, torch.nn.Parameter]") -> "dict[str, torch.Tensor]":
        import deepspeed

        found = {}
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters(parameter):
                found[name] = parameter.detach().clone()
        return found


def _engine(model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", clip: float, world: World) -> Any:
    """Return DeepSpeed's engine. What its `forward` would do is done here: objectives call the model's own."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its own use of them
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # it counts with this number and does nothing else
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": ZERO[world.engine],
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
        },
    }
    if world.device == "cpu" and not world.rank:
        print("DeepSpeed compiles a helper where it has none yet, which takes some minutes", flush=True)
    deepspeed.init_distributed(verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine
