"""What the stage `ppo` asks of an algorithm, whichever it is: to sample, and to learn from what was sampled."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tasks.common.alignment.policy import Policy
from tasks.common.stage import StageError
from tasks.common.text.chat import Question
from tasks.common.training.updates import Updates

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampler:
    """How replies are sampled."""

    episodes: int  # of all processes
    minibatch: int  # of all processes
    max_new_tokens: int
    temperature: float
    missing_end_penalty: float
    seed: int


class Learner(Protocol):
    """A policy and everything that it learns from; implemented by `proximal.Trainer` and `by_trl.Learner`."""

    policy: Policy
    updates: Updates
    prompts: Sequence[Question]
    beta: float  # the price of leaving the tuned model
    steps: int  # optimizer steps taken
    average: "dict[str, torch.Tensor]"  # the moving average that is kept at the end; empty where there is none

    def sample(self, iteration: int) -> tuple[Any, dict[str, float]]:
        """Return an iteration's replies with all that `iterate` needs, and the figures to watch."""
        ...

    def iterate(self, rollout: Any, iteration: int, rate: float, kl: float) -> dict[str, float]:
        """Learn from an iteration's replies, whose KL was `kl`, and return the means over the updates."""
        ...


def must_be_finite(figures: Mapping[str, float], update: int, rate: float) -> None:
    """Raise StageError where a figure of an update is no finite number."""
    if not all(map(math.isfinite, figures.values())):
        raise StageError(
            f"update {update} has no finite loss or gradient ({dict(figures)}); lower ppo.optimizer.learning_rate (the "
            f"rate of this update was {rate:g})."
        )
