"""Preference: how often a judge prefers a model's sampled replies to those of another model.

The judge is the reward model whose role is `judge`, which scores the replies here, or a language model behind an
OpenAI-compatible endpoint. `compare` pairs the replies, because only there the answers of both models meet.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.common.evaluation.judge_model import JudgeModel
from tasks.evaluate.evaluation import Evaluation, Facts, Result
from tasks.evaluate.replies import NO_REPLIES

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject


class Judge(Evaluation):
    """Win rate against another model."""

    KIND: ClassVar[str] = "judge"
    APPLIES_TO: ClassVar[str] = (
        "Causal models with a chat template, against another evaluated model, with held-out conversations; "
        "by a reward model with the role `judge`, or any OpenAI-compatible model."
    )
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions", "judge")
    USES_REPLIES: ClassVar[bool] = True

    kind: Literal["judge"] = Field(description="Kind of evaluation")
    by: JudgeModel | None = Field(
        default=None, description="Language model that judges; null: the reward model whose role is judge"
    )
    against: str | None = Field(
        default=None, description="Entry of evaluate to compare with; null: the model before alignment"
    )
    pairs: int | None = Field(default=None, description="Maximum number of pairs of replies; null: all", ge=1)

    def inputs(self) -> tuple[str, ...]:
        """Return the inputs: a language model needs no reward model."""
        return self.INPUTS if self.by is None else ("instructions",)

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the win rate, if there is a judge and a model to compare with."""
        judged = self.by is not None or "judge" in facts.roles
        other = self.against or facts.before
        return ("win_rate",) if facts.instructions and judged and other and other != facts.entry else ()

    def measure(self, subject: "Subject") -> Result:
        """Sample the replies; a reward model scores them."""
        if self.by is None and "judge" not in subject.job.inputs:
            return Result(absent="no reward model has the role judge")
        if not subject.samples.rows:
            return Result(absent=NO_REPLIES)
        if self.by is not None:
            return Result(sampled={})
        scores = subject.scorer("judge").score(subject.samples.exchanges)
        return Result(sampled={"judge_score": [round(score, 5) for score in scores]})
