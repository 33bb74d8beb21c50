"""Pretraining text in a policy's loss, so that facts are kept (Ouyang et al. 2022, equation 2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.common.alignment.policy import Policy
from tasks.common.evaluation.surprise import windows_surprise
from tasks.common.settings import Settings
from tasks.common.text.shards import Mixture, Split, Weights
from tasks.common.training.parallel import World
from tasks.common.training.updates import Updates

if TYPE_CHECKING:
    import torch


class Ptx(Settings):
    """Pretraining text in the policy's loss, so that facts are kept."""

    weight: float = Field(description="gamma: weight of the pretraining loss; 0 leaves it out", ge=0)
    batch: int = Field(description="Windows an update", ge=1)
    window: int = Field(description="Length of a window, in tokens", ge=16)
    mixture: Weights


@dataclass(frozen=True)
class Term:
    """The term that pretraining text adds to the loss of every update."""

    weight: float
    mixture: Mixture
    world: World

    @classmethod
    def of(cls, config: Ptx, split: Split, seed: int, world: World) -> "Term | None":
        """Return the term on a split's texts; None where it has no weight."""
        if not config.weight:
            return None
        return cls(config.weight, Mixture(split, config.window, config.batch, config.mixture, seed), world)

    def add(self, policy: Policy, updates: Updates, step: int) -> "torch.Tensor":
        """Add the gradient of a step's windows; return their causal loss (nats a token)."""
        import torch

        mine = slice(self.world.rank, None, self.world.size)
        ids = torch.from_numpy(self.mixture.batch(step, mine))  # (B, T)
        count = self.world.sum(torch.tensor(float(ids[:, 1:].numel()), device=self.world.device))
        mean = windows_surprise(policy.model, ids, policy.numerics) / count
        updates.backward(self.weight * mean)
        return self.world.sum(mean.detach())
