"""Preferences: how often a model finds the reply that people preferred likelier than the rejected one.

Replies are compared by their mean log-likelihood per token, end token included (the reward of SimPO: Meng et al. 2024,
arXiv 2405.14734, equation 3), because a sum favours the shorter reply. For a model behind an alignment `compare` also
gives the accuracy of DPO's implicit reward, from the summed log-likelihoods that both models give to the same replies.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tasks.common import stable_hash, tables
from tasks.common.modelling import models
from tasks.common.reward.ratings import mean_score
from tasks.common.text import chat
from tasks.evaluate.evaluation import Evaluation, Facts, Mean, Result, Row, Rows, answer_row, means_of

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

KIND = "preference"  # of the rows
MEANS = {"preference_accuracy": Mean(KIND, "correct", rate=True)}
IMPLICIT = "implicit_reward_accuracy"
ABSENT = {
    "control_token": "spell a special token of the model", "too_long": "do not fit the context",
    "same_tokens": "are the same to the model",
}  # fmt: skip


class Preferences(Evaluation):
    """Accuracy of the order that a model's likelihoods give to held-out preference pairs."""

    KIND: ClassVar[str] = "preferences"
    APPLIES_TO: ClassVar[str] = "Causal models with a chat template, and held-out rankings or preference pairs."
    INPUTS: ClassVar[tuple[str, ...]] = ("rankings", "instructions")

    kind: Literal["preferences"] = Field(description="Kind of evaluation")
    rankings: int = Field(
        default=100, description="Maximum number of held-out rankings; every pair of a ranking counts", ge=1
    )
    against: str | None = Field(
        default=None,
        description="Entry of evaluate with the reference model of the implicit reward; null: the model before "
        "alignment",
    )

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the accuracy by likelihood and, with a reference model, by the implicit reward."""
        if not facts.rankings:
            return ()
        other = self.against or facts.before
        return (*MEANS, IMPLICIT) if other and other != facts.entry else tuple(MEANS)

    def measure(self, subject: "Subject") -> Result:
        """Score the responses of held-out rankings, each once."""
        if subject.decoder.tokenizer.chat_template is None:
            return Result(absent="the model has no chat template")
        chosen = _choose(tables.read(subject.job.inputs["rankings"], "heldout").to_pylist(), self.rankings)
        if not chosen:
            return Result(absent="no ranking is held out")
        with models.suppress_warnings("transformers"):  # of long texts, which are counted
            pairs, left_out = _read_pairs(chosen, subject)
        details = {"rankings": len(chosen), "pairs": len(pairs), **left_out}
        if left_out:
            print(f"{subject.job.name}: left out of {len(chosen)} held-out rankings: {_describe(left_out)}")
        if not pairs:
            why = _describe(left_out) or "all responses are tied"
            return Result(absent=f"no pair of the held-out rankings can be used: {why}", details=details)
        rows = _score(pairs, subject)
        prompts = [pair.ranking["prompt"] for pair in pairs]
        subject.mark_seen_text(rows, prompts, ("instructions", "rankings"))
        figures, means = means_of(rows, MEANS)
        return Result(figures, rows, means=means, details=details)


class Reply(NamedTuple):
    """A response with its prompt as the model reads them; its own tokens are those of `mask` from `first` on."""

    ids: tuple[int, ...]
    first: int
    mask: tuple[bool, ...]


class Pair(NamedTuple):
    """A preferred and a rejected response of a ranking, by their numbers, and as the model reads them."""

    ranking: Row
    better: int
    worse: int
    chosen: Reply
    rejected: Reply


def _choose(table: Rows, count: int) -> Rows:
    """Return up to `count` rankings, ordered by id (a hash)."""
    return sorted(table, key=lambda row: str(row["id"]))[:count]


def _read_pairs(rankings: Rows, subject: "Subject") -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs that the model can compare, and the number of the others by reason; ties make no pair."""
    decoder, pairs, left_out = subject.decoder, list[Pair](), Counter[str]()
    for row in rankings:
        ordered = _ordered(row)
        texts = [{"content": text} for text in row["responses"]]
        if chat.spells_control_token(decoder.special_tokens, [*row["prompt"], *texts]):
            left_out["control_token"] += len(ordered)
            continue
        replies = [_encode(decoder.tokenizer, row["prompt"], text) for text in row["responses"]]
        for better, worse in ordered:
            chosen, rejected = replies[better], replies[worse]
            if max(len(chosen.ids), len(rejected.ids)) > decoder.context:
                left_out["too_long"] += 1
            elif chosen == rejected:
                left_out["same_tokens"] += 1
            else:
                pairs.append(Pair(row, better, worse, chosen, rejected))
    return pairs, dict(left_out)


def _ordered(row: Row) -> list[tuple[int, int]]:
    """Return the (better, worse) responses of a ranking, by their numbers."""
    ranks = [-mean_score(scores) for scores in row["scores"]] if row["scores"] else row["ranks"]
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def _encode(tokenizer: Any, prompt: Sequence[chat.Message], text: str) -> Reply:
    """Return a response with its prompt, with the end token as in training."""
    first = len(chat.encode_prompt(tokenizer, prompt))
    ids, mask = chat.encode_chat(tokenizer, [*prompt, {"role": "assistant", "content": text}])
    return Reply(tuple(ids), first, tuple(mask))


def _score(pairs: Sequence[Pair], subject: "Subject") -> Rows:
    """Return a row for each pair; a response of several pairs is scored once."""
    replies = list(dict.fromkeys(reply for pair in pairs for reply in (pair.chosen, pair.rejected)))
    scores = subject.decoder.token_scores(
        [reply.ids for reply in replies], [reply.first for reply in replies], f"{subject.job.name} preferences"
    )
    logp = {
        reply: score.logp[np.array(reply.mask[reply.first :])] for reply, score in zip(replies, scores, strict=True)
    }
    return [_pair_row(pair, logp) for pair in pairs]


def _pair_row(pair: Pair, logp: Mapping[Reply, npt.NDArray[np.float64]]) -> Row:
    """Return the row of a pair; rankings of one prompt are one cluster of the intervals."""
    ranking, chosen, rejected = pair.ranking, logp[pair.chosen], logp[pair.rejected]
    texts = [ranking["responses"][number] for number in (pair.better, pair.worse)]
    prompt = [text for turn in ranking["prompt"] for text in (turn["role"], turn["content"])]
    item = {
        "id": f"{ranking['id']}:{pair.better}>{pair.worse}", "entity": stable_hash.short_id(*prompt),
        "split": ranking["split"], "answer": texts[0], "messages": [*ranking["prompt"], {"content": texts[0]}],
    }  # fmt: skip
    return answer_row(item, KIND, texts[1]) | {
        "correct": bool(chosen.mean() > rejected.mean()),
        "chosen_nats": round(float(-chosen.sum()), 6), "rejected_nats": round(float(-rejected.sum()), 6),
    }  # fmt: skip


def _describe(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} pairs {ABSENT[reason]}" for reason, count in left_out.items())
