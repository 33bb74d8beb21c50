"""Rankings as the reward model reads them: who beats whom, and which of them which model may learn from."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.common import draw
from tasks.common.evaluation.scoring import Reads, encode
from tasks.common.ratings import mean_score
from tasks.common.stage import StageError
from tasks.common.text.chat import Exchange, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Ranking:
    """One prompt's responses: token ids, mean ratings (None where people only ranked), and who beats whom."""

    id: str
    prompt: list[Message]
    texts: list[str]
    ids: list[list[int]]  # of what the model reads: a response, or the prompt and a response
    ratings: list[float] | None
    pairs: list[tuple[int, int, float]]  # better, worse, gap in rating points (NaN where people only ranked)
    order: list[list[int]]  # the responses, best first; those in one group are tied
    cut: int  # how many responses have more tokens than the model reads

    @property
    def exchanges(self) -> list[Exchange]:
        """The responses, each with the prompt."""
        return [(self.prompt, text) for text in self.texts]


def raters_scale(rows: Sequence[Row]) -> list[float] | None:
    """Return the ends of the one scale that all scores are on, None without scores; raise StageError for several."""
    scales = Counter(tuple(row["scale"]) for row in rows if row["scores"] is not None)
    if len(scales) > 1:
        found = "; ".join(f"{low:g} to {high:g} in {count}" for (low, high), count in scales.most_common())
        raise StageError(
            f"the rankings' scores are on different scales ({found} rankings), and cannot be compared: bring them onto "
            "one scale in their sources, or give ranks instead."
        )
    return list(next(iter(scales))) if scales else None


def share_of(rows: Sequence[Row], key: str, judge_share: float, reads: Reads) -> list[Row]:
    """Return the training rankings of the policy's reward model or of the judge, by `key`: no ranking is in both.

    A model that reads the conversation shares no prompt with the other: the prompt's hash decides. Where the response
    alone is read the responses' do, as prompts then may say nothing and be all alike; the judge also does without
    rankings that hold a response of the policy's.
    """

    def judges(row: Row) -> bool:
        turns = [text for turn in row["prompt"] for text in (turn["role"], turn["content"])]
        told = turns if reads == "conversation" else sorted(row["responses"])
        return draw.share("judge", *told) < judge_share

    policys = [row for row in rows if not judges(row)]
    if key == "policy":
        return policys
    seen = {text for row in policys for text in row["responses"]} if reads == "response" else set()
    return [row for row in rows if judges(row) and seen.isdisjoint(row["responses"])]


def read_ranking(row: Row, tokenizer: "PreTrainedTokenizerFast", longest: int, reads: Reads) -> Ranking:
    """Return a ranking's replies, encoded, with the pairs and the order that people gave (ties make no pair)."""
    ratings = None if row["scores"] is None else [mean_score(scores) for scores in row["scores"]]
    places = [-value for value in ratings] if ratings else row["ranks"]
    pairs = [
        (i, j, ratings[i] - ratings[j] if ratings else math.nan)
        for i in range(len(places)) for j in range(len(places)) if places[i] < places[j]
    ]  # fmt: skip
    order = [[i for i, other in enumerate(places) if other == place] for place in sorted(set(places))]
    before = row["prompt"] if reads == "conversation" else ()
    ids = [encode(tokenizer, text, longest, before) for text in row["responses"]]
    cut = sum(
        len(found) == longest and len(encode(tokenizer, text, longest + 1, before)) > longest
        for text, found in zip(row["responses"], ids, strict=True)
    )
    return Ranking(row["id"], row["prompt"], row["responses"], ids, ratings, pairs, order, cut)
