"""Figures of the sampled replies: their reward, the judge's score, and their diversity."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.common.evaluation import scorecard
from tasks.evaluate.evaluation import Evaluation, Facts, Result

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

NO_REPLIES = "no conversation leaves room for a reply"


class Reward(Evaluation):
    """Mean reward of sampled replies, by the reward model whose role is `train`."""

    KIND: ClassVar[str] = "reward"
    APPLIES_TO: ClassVar[str] = "Causal models with a chat template, and a reward model with the role `train`."
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions", "train")
    USES_REPLIES: ClassVar[bool] = True

    kind: Literal["reward"] = Field(description="Kind of evaluation")

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return mean and standard deviation."""
        return ("reward_mean", "reward_std") if facts.instructions and "train" in facts.roles else ()

    def measure(self, subject: "Subject") -> Result:
        """Score the sampled replies."""
        if "train" not in subject.job.inputs:
            return Result(absent="no reward model has the role train")
        if not subject.samples.rows:
            return Result(absent=NO_REPLIES)
        rewards = [round(score, 5) for score in subject.scorer("train").score(subject.samples.exchanges)]
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
        return Result({"reward_mean": round(mean, 4), "reward_std": round(spread, 4)}, sampled={"reward": rewards})


class Diversity(Evaluation):
    """Diversity and repetition of sampled replies."""

    KIND: ClassVar[str] = "diversity"
    APPLIES_TO: ClassVar[str] = "Causal models with a chat template, and conversations."
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions",)
    USES_REPLIES: ClassVar[bool] = True

    kind: Literal["diversity"] = Field(description="Kind of evaluation")

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the share of distinct pairs, and that of repeated triples."""
        return ("distinct_2", "repetition") if facts.instructions else ()

    def measure(self, subject: "Subject") -> Result:
        """Count word pairs and triples."""
        texts = subject.samples.texts
        if not texts:
            return Result(absent=NO_REPLIES)
        figures = {
            "distinct_2": round(scorecard.distinct_n(texts, 2), 4),
            "repetition": round(scorecard.repetition(texts), 4),
        }
        return Result(figures, sampled={})
