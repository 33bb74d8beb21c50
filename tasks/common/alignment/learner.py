"""What the stage `ppo` asks of an algorithm, whichever it is: to sample, and to learn from what was sampled."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tasks.common.alignment.policy import Policy
from tasks.common.alignment.proximal import Prompt
from tasks.common.training.updates import Updates

if TYPE_CHECKING:
    import torch


class Learner(Protocol):
    """A policy and everything that it learns from; implemented by `proximal.Trainer` and `by_trl.Learner`."""

    policy: Policy
    updates: Updates
    prompts: Sequence[Prompt]
    beta: float  # the price of leaving the tuned model
    steps: int  # optimizer steps taken
    average: "dict[str, torch.Tensor]"  # the moving average that is kept at the end; empty where there is none

    def sample(self, iteration: int) -> tuple[Any, dict[str, float]]:
        """Return an iteration's replies with all that `iterate` needs, and the figures to watch."""
        ...

    def iterate(self, rollout: Any, iteration: int, rate: float, kl: float) -> dict[str, float]:
        """Learn from an iteration's replies, whose KL was `kl`, and return the means over the updates."""
        ...

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return a copy of the weights that are trained."""
        ...

    def take_up(self, weights: "dict[str, torch.Tensor]") -> None:
        """Go on with other trained weights."""
        ...
