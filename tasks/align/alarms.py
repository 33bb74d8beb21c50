"""Reward-hacking alarms: the reward rises while the quality that it approximates falls.

Beyond some point a policy scores higher with its reward model and gets worse otherwise (Gao et al. 2023, "Scaling Laws
for Reward Model Overoptimization"). Every few iterations the policy therefore answers held-out questions, and length,
diversity and repetition of its replies are measured. Where no conversation has a short answer, the loss of the held-out
reference answers takes the place of exact match. An alarm is raised if the reward is above that of the first check and
one of these metrics is out of bounds. The weights with the highest reward that passed are kept for a rollback.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common.evaluation import scorecard
from tasks.common.evaluation.exact_match import Extractor, exact_match
from tasks.common.settings import Settings

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]


class Alarms(Settings):
    """When the policy is checked, which change since the first check raises an alarm, and the action."""

    every: int = Field(default=3, description="Iterations between two checks", ge=1)
    questions: int = Field(default=48, description="Held-out questions that the policy answers (greedy decoding)", ge=0)
    max_exact_match_drop: float = Field(
        default=0.08, description="Largest allowed drop of the exact-match rate", ge=0, le=1
    )
    max_answer_loss_rise: float = Field(
        default=1.0,
        description="Largest allowed rise of the loss of held-out reference answers (nats per token); measured where "
        "no held-out conversation has a short answer",
        gt=0,
    )
    max_kl: float = Field(
        default=12.0, description="Largest allowed KL to the tuned model (nats per reply), whatever the reward", gt=0
    )
    max_length_ratio: float = Field(default=2.0, description="Largest factor by which replies may grow or shrink", gt=1)
    min_distinct_2_ratio: float = Field(
        default=0.6,
        description="Smallest allowed ratio of the replies' distinct-2 to that of the first check",
        ge=0,
        le=1,
    )
    max_repetition_rise: float = Field(
        default=0.2,
        description="Largest allowed rise of the share of word triples that repeat within a reply",
        ge=0,
        le=1,
    )
    action: Literal["rollback", "stop", "warn"] = Field(
        default="warn",
        description="rollback: end with the policy of the highest reward that passed; stop: end with an error; warn: "
        "print the alarm and continue",
    )


@dataclass(frozen=True)
class Scorecard:
    """The held-out questions of the alarms."""

    rows: Sequence[Mapping[str, Any]]
    extractor: Extractor
    references: Sequence[Mapping[str, Any]] = ()  # held-out conversations, if none has a short answer

    @classmethod
    def of(cls, table: Sequence[dict[str, Any]], count: int, has_room: Callable[[dict[str, Any]], bool]) -> "Scorecard":
        """Return up to `count` held-out questions of the instructions table that have a short answer.

        Without any, up to `count` held-out conversations are the references.
        """
        rows = scorecard.choose_questions(table, "heldout", count, has_room)
        references = [] if rows else scorecard.choose_conversations(table, "heldout", count)
        return cls(rows, Extractor.learn(row for row in table if row["split"] == "train"), references)

    @property
    def questions(self) -> list[list[dict[str, str]]]:
        """The conversations without their last answer."""
        return [list(row["messages"][:-1]) for row in self.rows]

    def accuracy(self, replies: Sequence[str]) -> float:
        """Return the exact-match rate of replies, one per question; there must be at least one."""
        matches = [
            exact_match(self.extractor.extract(reply, row["entity"]), row["answer"])
            for row, reply in zip(self.rows, replies, strict=True)
        ]
        return sum(matches) / len(matches)


@dataclass
class AlarmMonitor:
    """State of the checks: the baseline, and the best policy that passed."""

    alarms: Alarms
    baseline: dict[str, float] = field(default_factory=dict)
    best_reward: float = float("-inf")
    best_iteration: int = -1
    best_weights: Weights = field(default_factory=dict)  # the trainable weights that passed with the highest reward

    def due(self, iteration: int, iterations: int) -> bool:
        """Return whether to check the policy in this iteration: every few iterations, and at the end."""
        return iteration % self.alarms.every == 0 or iteration == iterations

    def check(self, iteration: int, figures: dict[str, float], weights: Callable[[], Weights]) -> list[str]:
        """Return the alarms of an iteration's metrics; without any, keep the weights if the reward is the best so far.

        `figures` has `reward`, `kl`, `length`, `distinct_2`, `repetition`, and `exact_match` if there are questions
        with short answers, or else `answer_loss` if there are held-out conversations.
        """
        self.baseline = self.baseline or dict(figures)
        alarms = self.find_alarms(figures)
        if not alarms and figures["reward"] > self.best_reward:
            self.best_reward, self.best_iteration, self.best_weights = figures["reward"], iteration, weights()
        return alarms

    def find_alarms(self, now: Mapping[str, float]) -> list[str]:
        """Return the metrics out of bounds: the KL always, the others only if the reward is above the baseline's."""
        baseline, limits = self.baseline, self.alarms
        alarms = [f"KL {now['kl']:.1f} nats per reply"] if now["kl"] > limits.max_kl else []
        if now["reward"] <= baseline["reward"]:
            return alarms
        if "exact_match" in baseline and now["exact_match"] < baseline["exact_match"] - limits.max_exact_match_drop:
            alarms.append(f"exact match {100 * baseline['exact_match']:.1f} → {100 * now['exact_match']:.1f} %")
        if "answer_loss" in baseline and now["answer_loss"] > baseline["answer_loss"] + limits.max_answer_loss_rise:
            alarms.append(f"loss of reference answers {baseline['answer_loss']:.2f} → {now['answer_loss']:.2f}")
        shortest, longest = baseline["length"] / limits.max_length_ratio, baseline["length"] * limits.max_length_ratio
        if not shortest <= now["length"] <= longest:
            alarms.append(f"length {baseline['length']:.1f} → {now['length']:.1f} tokens")
        if now["distinct_2"] < baseline["distinct_2"] * limits.min_distinct_2_ratio:
            alarms.append(f"distinct-2 {baseline['distinct_2']:.2f} → {now['distinct_2']:.2f}")
        if now["repetition"] > baseline["repetition"] + limits.max_repetition_rise:
            alarms.append(f"repetition {baseline['repetition']:.2f} → {now['repetition']:.2f}")
        return alarms
