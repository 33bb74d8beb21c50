"""Pairs of replies to one question, the better and the worse, that DPO learns from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.common.alignment.alternatives import Ranked
from tasks.common.evaluation.rankings import Row, share_of
from tasks.common.ratings import mean_score
from tasks.common.stage import StageError
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pair:
    """A question and two replies to it as token ids; a reply ends with the end token where it has ended."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def row(self) -> dict[str, list[int]]:
        """The pair under the names of TRL's collator."""
        return {"prompt_ids": self.prompt, "chosen_ids": self.chosen, "rejected_ids": self.rejected}


def of_replies(
    prompts: Sequence[list[int]], replies: Sequence[list[int]], scores: Sequence[float], generations: int
) -> list[Pair]:
    """Return for each question the most and the least rewarded of its replies, which lie side by side.

    Where all have one reward there is no pair.
    """
    found = []
    for start in range(0, len(replies), generations):
        places = range(start, start + generations)
        best, worst = max(places, key=lambda place: scores[place]), min(places, key=lambda place: scores[place])
        if scores[best] > scores[worst]:
            found.append(Pair(prompts[start], replies[best], replies[worst]))
    return found


def of_rankings(
    tokenizer: "PreTrainedTokenizerFast", table: Sequence[Row], settings: Ranked
) -> list[Pair]:  # fmt: skip
    """Return what beats what in the training rankings that the judge does not learn from; ties make no pair.

    Raises StageError where there is none, and for a response that the model cannot read to its end.
    """
    rows = [row for row in table if row["split"] == "train"]
    found = []
    for row in share_of(rows, "policy", settings.judge_share, settings.reads):
        prompt = chat.encode_prompt(tokenizer, row["prompt"])
        replies = [_reply(tokenizer, row, prompt, text) for text in row["responses"]]
        places = [-mean_score(scores) for scores in row["scores"]] if row["scores"] else row["ranks"]
        found += [
            Pair(prompt, replies[i], replies[j])
            for i in range(len(places)) for j in range(len(places)) if places[i] < places[j]
        ]  # fmt: skip
    if not found:
        raise StageError(
            "the training rankings hold no response that beats another, so ppo.algorithm.pairs finds none there; take "
            "{name: sampled, ...}, or give `ingest.sources` some."
        )
    return found


def _reply(tokenizer: "PreTrainedTokenizerFast", row: Row, prompt: list[int], text: str) -> list[int]:
    ids, answers = chat.encode_chat(tokenizer, [*row["prompt"], {"role": "assistant", "content": text}])
    if len(ids) > tokenizer.model_max_length:
        raise StageError(
            f"a response of the ranking {row['id']} takes {len(ids)} tokens with its prompt, and the model reads "
            f"{tokenizer.model_max_length}: lower validate.message_characters, which refuses such rows, or let "
            "ppo.algorithm.pairs be sampled."
        )
    return [token for token, answer in zip(ids[len(prompt) :], answers[len(prompt) :], strict=True) if answer]
