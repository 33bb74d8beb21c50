"""Preference pairs for DPO: a chosen and a rejected reply to the same prompt."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.align.rewards import Rankings
from tasks.common.harness.job import StageError
from tasks.common.reward.rankings import Row, rows_for_role, split_control_tokens
from tasks.common.reward.ratings import mean_score
from tasks.common.text import chat
from tasks.common.training.loop import MAX_LISTED_ITEMS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Why pairs of rankings are rejected, as printed.
REASONS = {
    "same_tokens": "are the same tokens",
    "too_long": "are longer than the model's context of {context} tokens",
    "control_token": "spell a special token of the model's tokenizer",
}


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


@dataclass(frozen=True)
class RankedPairs:
    """Pairs of people's rankings, and those that were rejected: by reason, the ranking of each pair."""

    pairs: list[Pair] = field(default_factory=list)
    rejections: dict[str, list[str]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, object]:
        """The numbers of rejected pairs by reason, and some of their rankings; nothing where all pairs are used."""
        if not self.rejections:
            return {}
        ids = dict.fromkeys(name for names in self.rejections.values() for name in names)
        counts = {reason: len(names) for reason, names in self.rejections.items()}
        return {"rejected_pairs": counts, "rejected_rankings": list(ids)[:MAX_LISTED_ITEMS]}


def from_replies(
    prompts: Sequence[list[int]], replies: Sequence[list[int]], scores: Sequence[float], generations: int
) -> list[Pair]:
    """Return a pair of each prompt's highest and lowest rewarded replies; replies to one prompt are adjacent.

    A prompt whose replies all have the same reward makes no pair, nor do replies of the same tokens.
    """
    found_pairs = []
    for start in range(0, len(replies), generations):
        group = range(start, start + generations)
        best, worst = max(group, key=lambda index: scores[index]), min(group, key=lambda index: scores[index])
        if scores[best] > scores[worst] and replies[best] != replies[worst]:
            found_pairs.append(Pair(prompts[start], replies[best], replies[worst]))
    return found_pairs


def from_rankings(tokenizer: "PreTrainedTokenizerFast", table: Sequence[Row], settings: Rankings) -> RankedPairs:
    """Return the pairs of the training rankings that are not reserved for the judges; ties make no pair.

    A pair is rejected if its replies are the same tokens, or one of them exceeds the model's context with its prompt; a
    ranking, if it spells a special token. Raises StageError if there is no pair.
    """
    rows = [row for row in table if row["split"] == "train"]
    rows, spelled = split_control_tokens(rows_for_role(rows, "train", settings.judge_share, settings.input), tokenizer)
    found_pairs: list[Pair] = []
    rejections: dict[str, list[str]] = {"control_token": spelled} if spelled else {}
    for row in rows:
        prompt = chat.encode_prompt(tokenizer, row["prompt"])
        replies = [_reply(tokenizer, row, prompt, text) for text in row["responses"]]
        ranks = [-mean_score(scores) for scores in row["scores"]] if row["scores"] else row["ranks"]
        for chosen, rejected in (
            (replies[i], replies[j])
            for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]
        ):  # fmt: skip
            if chosen is None or rejected is None:
                rejections.setdefault("too_long", []).append(row["id"])
            elif chosen == rejected:
                rejections.setdefault("same_tokens", []).append(row["id"])
            else:
                found_pairs.append(Pair(prompt, chosen, rejected))
    if not found_pairs:
        raise StageError(_describe_no_pair(rejections, tokenizer.model_max_length))
    if rejections:
        print(_describe_rejections(rejections, tokenizer.model_max_length), flush=True)
    return RankedPairs(found_pairs, rejections)


def _describe_rejections(rejections: dict[str, list[str]], context: int) -> str:
    """Return the sentence on the pairs that were rejected, by reason, with some of their rankings."""
    parts = []
    for reason, names in rejections.items():
        ids = list(Counter(names))
        more = ", …" if len(ids) > MAX_LISTED_ITEMS else ""
        unit = "rankings" if reason == "control_token" else "pairs"
        listed = f"{', '.join(ids[:MAX_LISTED_ITEMS])}{more}"
        parts.append(f"{len(names)} {unit} {REASONS[reason].format(context=context)} (rankings {listed})")
    return f"rejected preference pairs: {'; '.join(parts)}"


def _describe_no_pair(rejections: dict[str, list[str]], context: int) -> str:
    """Return the error for rankings without a pair to learn from."""
    if not rejections:
        return (
            "the training rankings contain no response that beats another, so there is nothing to learn from; use a "
            "reward model as the reward, or add rankings to `ingest.sources`."
        )
    return (
        f"no preference pair can be used; {_describe_rejections(rejections, context)}. Expected are two different "
        "responses that fit into the model's context with their prompt: shorten or correct the rankings, use a model "
        "with a longer context, or use a reward model as the reward."
    )


def _reply(tokenizer: "PreTrainedTokenizerFast", row: Row, prompt: list[int], text: str) -> list[int] | None:
    """Return the tokens of a response; None if it exceeds the model's context with its prompt."""
    ids, answers = chat.encode_chat(tokenizer, [*row["prompt"], {"role": "assistant", "content": text}])
    if len(ids) > tokenizer.model_max_length:
        return None
    return [token for token, answer in zip(ids[len(prompt) :], answers[len(prompt) :], strict=True) if answer]
