"""The pretraining loss in a policy's update, which prevents forgetting (Ouyang et al. 2022, equation 2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.align.policy import Policy
from tasks.common.evaluation.nll import windows_nll
from tasks.common.settings import Settings
from tasks.common.text.mixtures import Mixture, Weights
from tasks.common.text.shards import Split
from tasks.common.training.parallel import World
from tasks.common.training.updates import TrainEngine

if TYPE_CHECKING:
    import torch


class Ptx(Settings):
    """Settings of the pretraining loss in the policy's update."""

    weight: float = Field(default=0.0, description="gamma: weight of the pretraining loss; 0 disables it", ge=0)
    batch: int = Field(default=16, description="Windows per update", ge=1)
    window: int = Field(default=64, description="Length of a window, in tokens", ge=16)
    mixture: Weights = Field(default={"prose": 1.0})


@dataclass(frozen=True)
class PtxTerm:
    """The pretraining term of every update's loss."""

    weight: float
    mixture: Mixture
    world: World

    @classmethod
    def of(cls, config: Ptx, split: Split, seed: int, world: World) -> "PtxTerm | None":
        """Return the term on a split's texts; None if its weight is 0."""
        if not config.weight:
            return None
        return cls(config.weight, Mixture(split, config.window, config.batch, config.mixture, seed), world)

    def backward(self, policy: Policy, train_engine: TrainEngine, step: int) -> "torch.Tensor":
        """Accumulate the gradient of a step's windows; return their mean causal loss (nats per token)."""
        import torch

        rows = slice(self.world.rank, None, self.world.size)
        ids = torch.from_numpy(self.mixture.batch(step, rows))  # (B, T)
        count = self.world.sum(torch.tensor(float(ids[:, 1:].numel()), device=self.world.device))
        mean = windows_nll(policy.model, ids, policy.numerics) / count
        train_engine.backward(self.weight * mean)
        return self.world.sum(mean.detach())
