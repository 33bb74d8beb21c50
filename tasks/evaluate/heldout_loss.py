"""Held-out loss: how well a model predicts the assistant's turns of held-out conversations, and its calibration.

Conversations are rendered with the model's own chat template, and only tokens of the assistant's turns count. Nats per
token depend on the tokenizer; bits per byte of the answers do not, so they can be compared between models. Control
tokens have no bytes and count in neither bits nor bytes.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tasks.common.evaluation.scorecard import choose_conversations
from tasks.common.text import chat
from tasks.evaluate.evaluation import Evaluation, Facts, Mean, Result, Row, answer_row, means_of
from tasks.evaluate.token_scores import TokenScores

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

KIND = "reference"  # of the rows: the text is that of the data, not of the model
MEANS = {
    "answer_loss": Mean(KIND, "nats", by="tokens"),
    "answer_bits_per_byte": Mean(KIND, "text_nats", by="bytes", scale=1 / math.log(2)),
    "answer_token_accuracy": Mean(KIND, "top", by="tokens"),
}
CALIBRATION_BINS = 15
NOTHING_HELD_OUT = "no conversation is held out"


class Encoded(NamedTuple):
    """A conversation as the model reads it: its ids, and which of them are the assistant's."""

    row: Row
    ids: list[int]
    mask: list[bool]

    @property
    def first(self) -> int:
        """The position of the first token that counts; the first token of all is predicted from nothing."""
        return max(self.mask.index(True), 1)


class HeldoutLoss(Evaluation):
    """Negative log-likelihood of held-out answers, and calibration."""

    KIND: ClassVar[str] = "heldout_loss"
    APPLIES_TO: ClassVar[str] = "Causal models with a chat template, and held-out conversations."
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions",)

    kind: Literal["heldout_loss"] = Field(description="Kind of evaluation")
    conversations: int = Field(default=200, description="Maximum number of held-out conversations", ge=1)

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the loss per token and byte, token accuracy and calibration."""
        return (*MEANS, "answer_calibration_error") if facts.instructions else ()

    def measure(self, subject: "Subject") -> Result:
        """Score the held-out answers."""
        tokenizer = subject.decoder.tokenizer
        if tokenizer.chat_template is None:
            return Result(absent="the model has no chat template")
        chosen = choose_conversations(subject.table, "heldout", self.conversations)
        encoded = [Encoded(row, *chat.encode_chat(tokenizer, row["messages"])) for row in chosen]
        fitting = [one for one in encoded if len(one.ids) <= subject.decoder.context and any(one.mask[1:])]
        if len(fitting) < len(encoded):
            print(f"{subject.job.name}: {len(encoded) - len(fitting)} held-out conversations do not fit the context")
        if not fitting:
            return Result(absent="no held-out conversation fits the model's context" if encoded else NOTHING_HELD_OUT)
        scores = subject.decoder.token_scores(
            [one.ids for one in fitting], [one.first for one in fitting], f"{subject.job.name} answers"
        )
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        rows = [_scored_row(one, score, special) for one, score in zip(fitting, scores, strict=True)]
        subject.mark_seen_text(rows, [one.row["messages"][:-1] for one in fitting])
        figures, means = means_of(rows, MEANS)
        figures["answer_calibration_error"] = _calibration_of(fitting, scores)
        details = {"conversations": len(rows), "too_long": len(encoded) - len(fitting)}
        return Result(figures, rows, means=means, details=details)


def _scored_row(one: Encoded, scores: TokenScores, special: set[int]) -> Row:
    """Return the row of a conversation: nats of the assistant's tokens and of those with text, and their numbers."""
    ids, mask = np.array(one.ids[one.first :]), np.array(one.mask[one.first :])
    text = mask & ~np.isin(ids, list(special))
    spoken = [turn["content"] for turn in one.row["messages"] if turn["role"] == "assistant"]
    reply = one.row["messages"][-1]["content"]
    return answer_row(one.row, KIND, reply) | {
        "nats": round(float(-scores.logp[mask].sum()), 6), "tokens": int(mask.sum()),
        "text_nats": round(float(-scores.logp[text].sum()), 6), "top": int(scores.top[mask].sum()),
        "bytes": sum(len(content.encode("utf-8", "replace")) for content in spoken),
    }  # fmt: skip


def _calibration_of(encoded: Sequence[Encoded], scores: Sequence[TokenScores]) -> float:
    masks = [np.array(one.mask[one.first :]) for one in encoded]
    confidence = np.concatenate([score.confidence[mask] for score, mask in zip(scores, masks, strict=True)])
    correct = np.concatenate([score.top[mask] for score, mask in zip(scores, masks, strict=True)])
    return round(expected_calibration_error(confidence, correct), 4)


def expected_calibration_error(confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> float:
    """Return the expected calibration error of predictions (Guo et al. 2017, equation 3), both (N,).

    Predictions are grouped by confidence into bins of equal width; the error is the mean distance of a bin's mean
    confidence from its share of correct predictions, weighted by its size.
    """
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, confidence - correct, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
