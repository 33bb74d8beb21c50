"""Preference pairs for DPO: a chosen and a rejected reply to the same prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.align.rewards import Rankings
from tasks.common.harness.job import StageError
from tasks.common.reward.rankings import Row, rows_for_role
from tasks.common.reward.ratings import mean_score
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and two replies; a reply that was not truncated ends with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def trl_row(self) -> dict[str, list[int]]:
        """The pair under the column names of TRL's collator."""
        return {"prompt_ids": self.prompt, "chosen_ids": self.chosen, "rejected_ids": self.rejected}


def from_replies(
    prompts: Sequence[list[int]], replies: Sequence[list[int]], scores: Sequence[float], generations: int
) -> list[Pair]:
    """Return a pair of each prompt's highest and lowest rewarded replies; replies to one prompt are adjacent.

    A prompt whose replies all have the same reward makes no pair.
    """
    found_pairs = []
    for start in range(0, len(replies), generations):
        group = range(start, start + generations)
        best, worst = max(group, key=lambda index: scores[index]), min(group, key=lambda index: scores[index])
        if scores[best] > scores[worst]:
            found_pairs.append(Pair(prompts[start], replies[best], replies[worst]))
    return found_pairs


def from_rankings(
    tokenizer: "PreTrainedTokenizerFast", table: Sequence[Row], settings: Rankings
) -> list[Pair]:  # fmt: skip
    """Return the pairs of the training rankings that are not reserved for the judges; ties make no pair.

    Raises StageError if there is no pair, or if a response with its prompt exceeds the model's context.
    """
    rows = [row for row in table if row["split"] == "train"]
    found_pairs = []
    for row in rows_for_role(rows, "train", settings.judge_share, settings.input):
        prompt = chat.encode_prompt(tokenizer, row["prompt"])
        replies = [_reply(tokenizer, row, prompt, text) for text in row["responses"]]
        ranks = [-mean_score(scores) for scores in row["scores"]] if row["scores"] else row["ranks"]
        found_pairs += [
            Pair(prompt, replies[i], replies[j])
            for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]
        ]  # fmt: skip
    if not found_pairs:
        raise StageError(
            "the training rankings contain no response that beats another, so there is nothing to learn from; use a "
            "reward model as the reward, or add rankings to `ingest.sources`."
        )
    return found_pairs


def _reply(tokenizer: "PreTrainedTokenizerFast", row: Row, prompt: list[int], text: str) -> list[int]:
    ids, answers = chat.encode_chat(tokenizer, [*row["prompt"], {"role": "assistant", "content": text}])
    if len(ids) > tokenizer.model_max_length:
        raise StageError(
            f"a response of the ranking {row['id']} takes {len(ids)} tokens with its prompt, but the model reads "
            f"{tokenizer.model_max_length}: lower validate.max_message_characters, which rejects such rows, or use "
            "a reward model as the reward."
        )
    return [token for token, answer in zip(ids[len(prompt) :], answers[len(prompt) :], strict=True) if answer]
