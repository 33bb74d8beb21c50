"""Encoded rankings with their preference pairs, and the split of rankings between the train and judge reward models.

Two responses that are the same to a model, because they differ only after its `max_tokens`, make no pair: nothing can
be learnt from it, and it cannot be ordered.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tasks.common import stable_hash
from tasks.common.harness.job import StageError
from tasks.common.reward.ratings import mean_score
from tasks.common.reward.scoring import RewardInput, encode_reply
from tasks.common.text import chat
from tasks.common.text.chat import Exchange, Message
from tasks.common.text.words import split_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = Mapping[str, Any]
Role = Literal["train", "judge"]
ROLES: tuple[Role, ...] = ("train", "judge")
UNLIMITED_TOKENS = 2**31


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
    alike: int = 0  # number of pairs rejected because their responses are the same to the model

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


def split_control_tokens(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerFast") -> tuple[list[Row], list[str]]:
    """Return the rankings whose texts spell no special token of the tokenizer, and the ids of the others."""
    controls = chat.control_tokens(tokenizer)

    def spells_control(row: Row) -> bool:
        responses = [{"content": text} for text in row["responses"]]
        return chat.spells_control_token(controls, [*row["prompt"], *responses])

    spelled = [str(row["id"]) for row in rows if spells_control(row)]
    rejected = set(spelled)
    return [row for row in rows if row["id"] not in rejected], spelled


def read_ranking(
    row: Row, tokenizer: "PreTrainedTokenizerFast", max_tokens: int, input: RewardInput, *, lexicon: bool = False
) -> Ranking:
    """Return a ranking with its encoded responses, preference pairs and order; ties make no pair.

    With `lexicon`, the model also reads the words of the whole response.
    """
    ratings = None if row["scores"] is None else [mean_score(scores) for scores in row["scores"]]
    ranks = [-value for value in ratings] if ratings else row["ranks"]
    prompt = row["prompt"] if input == "conversation" else ()
    ids = [encode_reply(tokenizer, text, max_tokens, prompt) for text in row["responses"]]
    seen = [(found, split_words(text) if lexicon else []) for found, text in zip(ids, row["responses"], strict=True)]
    ordered = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    pairs = [(i, j, ratings[i] - ratings[j] if ratings else math.nan) for i, j in ordered if seen[i] != seen[j]]
    order = [[i for i, other in enumerate(ranks) if other == rank] for rank in sorted(set(ranks))]
    truncated = sum(
        len(kept) == max_tokens and len(encode_reply(tokenizer, text, max_tokens + 1, prompt)) > max_tokens
        for text, kept in zip(row["responses"], ids, strict=True)
    )
    return Ranking(
        row["id"], row["prompt"], row["responses"], ids, ratings, pairs, tie_alike(order, seen), truncated,
        alike=len(ordered) - len(pairs),
    )  # fmt: skip


def tie_alike(order: Sequence[list[int]], seen: Sequence[Any]) -> list[list[int]]:
    """Return an order, best first, in which responses that the model sees alike are tied, and those between them."""
    groups: list[list[int]] = []
    for group in order:
        found = (
            number for number, better in enumerate(groups) if any(seen[i] == seen[j] for i in better for j in group)
        )
        start = next(found, len(groups))
        groups[start:] = [[i for tied in (*groups[start:], group) for i in tied]]
    return groups


def first_difference(row: Row, tokenizer: "PreTrainedTokenizerFast", better: int, worse: int) -> int | None:
    """Return how many tokens of two responses a model must read to see a difference; None if there is none."""
    both = [encode_reply(tokenizer, row["responses"][i], UNLIMITED_TOKENS) for i in (better, worse)]
    return next((number + 1 for number, (a, b) in enumerate(zip(*both, strict=False)) if a != b), None)
