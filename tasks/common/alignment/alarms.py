"""Reward-hacking alarms: the reward rises while what it stands for goes wrong.

Beyond some point a policy gets better at pleasing its reward model and worse at everything else (Gao et al. 2023,
"Scaling Laws for Reward Model Overoptimization"). So the policy is put before a part of the held-out sheet every few
iterations, beside the length and the diversity of its replies. Where the reward is above the first look's and one of
them is out of bounds, the alarm goes off; the policy that passed with the most reward is kept for that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common.evaluation import sheet
from tasks.common.evaluation.answers import Extractor, exact_match
from tasks.common.settings import Settings

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]


class Alarms(Settings):
    """When the policy is looked at, what is too far from the first look, and what then happens."""

    every: int = Field(description="Iterations between two looks", ge=1)
    questions: int = Field(description="Held-out questions that the policy is asked (greedy)", ge=0)
    exact_match_drop: float = Field(description="Most that the share of right answers may fall", ge=0, le=1)
    kl: float = Field(description="Most KL of a reply to the tuned model (nats), whatever the reward", gt=0)
    length: float = Field(description="Factor by which replies may grow or shrink", gt=1)
    distinct_2: float = Field(description="Least share kept of the replies' distinct word pairs", ge=0, le=1)
    action: Literal["rollback", "stop", "tell"] = Field(
        description="rollback: end with the policy that passed with the most reward; stop: end with an error, "
        "after which other settings begin anew; tell: only say so"
    )


@dataclass(frozen=True)
class Sheet:
    """The questions that the policy is put before."""

    rows: Sequence[Mapping[str, Any]]
    extractor: Extractor

    @classmethod
    def of(cls, table: Sequence[dict[str, Any]], count: int, fits: Callable[[dict[str, Any]], bool]) -> "Sheet":
        """Return the sheet on up to `count` held-out questions of the instructions that have a short answer."""
        rows = sheet.choose(table, "heldout", count, fits)
        return cls(rows, Extractor.learn(row for row in table if row["split"] == "train"))

    @property
    def questions(self) -> list[list[dict[str, str]]]:
        """The conversations up to the answer."""
        return [list(row["messages"][:-1]) for row in self.rows]

    def right(self, replies: Sequence[str]) -> float:
        """Return the share of replies, of which there are some, that give the right answer."""
        found = [
            exact_match(self.extractor.extract(reply, row["entity"]), row["answer"])
            for row, reply in zip(self.rows, replies, strict=True)
        ]
        return sum(found) / len(found)


@dataclass
class Watch:
    """What the looks have found so far."""

    alarms: Alarms
    first: dict[str, float] = field(default_factory=dict)
    best_reward: float = float("-inf")
    best_iteration: int = -1
    best: Weights = field(default_factory=dict)  # the trained weights that passed with the most reward

    def due(self, iteration: int, iterations: int) -> bool:
        """Return whether the policy is to be looked at: every few iterations, and at the end."""
        return iteration % self.alarms.every == 0 or iteration == iterations

    def look(self, iteration: int, figures: dict[str, float], weights: Callable[[], Weights]) -> list[str]:
        """Return what is wrong in a look's figures; where nothing is, keep the weights if the reward is the best yet.

        `figures` are an iteration's: `reward`, `length`, `distinct_2`, and `exact_match` where questions are asked.
        """
        self.first = self.first or dict(figures)
        wrong = self.hacked(figures)
        if not wrong and figures["reward"] > self.best_reward:
            self.best_reward, self.best_iteration, self.best = figures["reward"], iteration, weights()
        return wrong

    def hacked(self, now: Mapping[str, float]) -> list[str]:
        """Return which figures are out of bounds while the reward is above the first look's, and the KL at any time."""
        first, bounds = self.first, self.alarms
        wrong = [f"KL {now['kl']:.1f} nats a reply"] if now["kl"] > bounds.kl else []
        if now["reward"] <= first["reward"]:
            return wrong
        if "exact_match" in first and now["exact_match"] < first["exact_match"] - bounds.exact_match_drop:
            wrong.append(f"exact match {100 * first['exact_match']:.1f} → {100 * now['exact_match']:.1f} %")
        if not first["length"] / bounds.length <= now["length"] <= first["length"] * bounds.length:
            wrong.append(f"length {first['length']:.1f} → {now['length']:.1f} tokens")
        if now["distinct_2"] < first["distinct_2"] * bounds.distinct_2:
            wrong.append(f"distinct-2 {first['distinct_2']:.2f} → {now['distinct_2']:.2f}")
        return wrong
