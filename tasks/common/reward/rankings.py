"""Encoded rankings with their preference pairs, and the split of rankings between the train and judge reward models."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tasks.common import stable_hash
from tasks.common.harness.job import StageError
from tasks.common.reward.ratings import mean_score
from tasks.common.reward.scoring import RewardInput, encode_reply
from tasks.common.text.chat import Exchange, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = Mapping[str, Any]
Role = Literal["train", "judge"]
ROLES: tuple[Role, ...] = ("train", "judge")


@dataclass(frozen=True)
class Ranking:
    """One prompt's responses with their token ids, mean ratings (None if people only ranked) and preference pairs."""

    id: str
    prompt: list[Message]
    texts: list[str]
    ids: list[list[int]]  # the model's inputs: each response, or the prompt and each response
    ratings: list[float] | None
    pairs: list[tuple[int, int, float]]  # better, worse, gap in rating points (NaN if people only ranked)
    order: list[list[int]]  # the responses, best first; responses in one group are tied
    truncated: int  # number of responses that were cut to the model's `max_tokens`

    @property
    def exchanges(self) -> list[Exchange]:
        """The (prompt, response) pairs that a scorer rates."""
        return [(self.prompt, text) for text in self.texts]


def rating_scale(rows: Sequence[Row]) -> list[float] | None:
    """Return [low, high] of the scale of all scores; None without scores. Raises StageError if scales differ."""
    scales = Counter(tuple(row["scale"]) for row in rows if row["scores"] is not None)
    if len(scales) > 1:
        found = "; ".join(f"{low:g} to {high:g} in {count}" for (low, high), count in scales.most_common())
        raise StageError(
            f"the rankings' scores are on different scales ({found} rankings) and cannot be compared: convert them to "
            "one scale in their sources, or give ranks instead."
        )
    return list(next(iter(scales))) if scales else None


def rows_for_role(rows: Sequence[Row], role: Role, judge_share: float, input: RewardInput) -> list[Row]:
    """Return the training rankings of a role's reward models; no ranking is in both roles.

    If the model reads the conversation, the prompt's hash decides, so the roles share no prompt. If it reads only the
    response, prompts may all be equal, so the responses' hash decides, and the judge skips rankings that contain a
    response of the train role.
    """

    def is_for_judge(row: Row) -> bool:
        turns = [text for turn in row["prompt"] for text in (turn["role"], turn["content"])]
        hashed = turns if input == "conversation" else sorted(row["responses"])
        return stable_hash.uniform("judge", *hashed) < judge_share

    train_rows = [row for row in rows if not is_for_judge(row)]
    if role == "train":
        return train_rows
    seen = {text for row in train_rows for text in row["responses"]} if input == "response" else set()
    return [row for row in rows if is_for_judge(row) and seen.isdisjoint(row["responses"])]


def read_ranking(row: Row, tokenizer: "PreTrainedTokenizerFast", max_tokens: int, input: RewardInput) -> Ranking:
    """Return a ranking with its encoded responses, preference pairs and order; ties make no pair."""
    ratings = None if row["scores"] is None else [mean_score(scores) for scores in row["scores"]]
    ranks = [-value for value in ratings] if ratings else row["ranks"]
    pairs = [
        (i, j, ratings[i] - ratings[j] if ratings else math.nan)
        for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]
    ]  # fmt: skip
    order = [[i for i, other in enumerate(ranks) if other == rank] for rank in sorted(set(ranks))]
    prompt = row["prompt"] if input == "conversation" else ()
    ids = [encode_reply(tokenizer, text, max_tokens, prompt) for text in row["responses"]]
    truncated = sum(
        len(kept) == max_tokens and len(encode_reply(tokenizer, text, max_tokens + 1, prompt)) > max_tokens
        for text, kept in zip(row["responses"], ids, strict=True)
    )
    return Ranking(row["id"], row["prompt"], row["responses"], ids, ratings, pairs, order, truncated)
