"""Preference: how often a judge prefers a model's sampled reply to that of the model before alignment.

Here the reward model whose role is `judge` scores the sampled replies. `compare` pairs the models' replies, because
only there the answers of both models meet.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.evaluate.evaluation import Evaluation, Facts, Result
from tasks.evaluate.replies import NO_REPLIES

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject


class Judge(Evaluation):
    """Win rate against the model before alignment, by the reward model whose role is `judge`."""

    KIND: ClassVar[str] = "judge"
    APPLIES_TO: ClassVar[str] = "Aligned causal models whose model before alignment is evaluated too, and a judge."
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions", "judge")
    USES_REPLIES: ClassVar[bool] = True

    kind: Literal["judge"] = Field(description="Kind of evaluation")

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the win rate, of an aligned model."""
        return ("win_rate",) if facts.instructions and facts.before and "judge" in facts.roles else ()

    def measure(self, subject: "Subject") -> Result:
        """Score the sampled replies."""
        if "judge" not in subject.job.inputs:
            return Result(absent="no reward model has the role judge")
        if not subject.samples.rows:
            return Result(absent=NO_REPLIES)
        scores = subject.scorer("judge").score(subject.samples.exchanges)
        return Result(sampled={"judge_score": [round(score, 5) for score in scores]})
