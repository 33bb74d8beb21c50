"""Bits per byte and perplexity of held-out text of the corpus."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.common.evaluation.nll import bits_per_byte
from tasks.common.text.shards import Split
from tasks.evaluate.evaluation import Evaluation, Facts, Result
from tasks.evaluate.models_under_test import Decoder, have_same_vocabulary

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

DEFAULT_WINDOW = 128  # tokens


class Text(Evaluation):
    """Negative log-likelihood of the corpus's held-out text."""

    KIND: ClassVar[str] = "text"
    APPLIES_TO: ClassVar[str] = (
        "Causal models with the vocabulary that the corpus was tokenized with, and held-out text in the corpus."
    )
    INPUTS: ClassVar[tuple[str, ...]] = ("tokenizer", "shards")

    kind: Literal["text"] = Field(description="Kind of evaluation")
    window: int | None = Field(
        default=None,
        description=f"Window length in tokens; null: {DEFAULT_WINDOW}, or the model's context if that is shorter",
        ge=16,
    )

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return perplexity and bits per byte."""
        return ("perplexity", "bits_per_byte") if facts.corpus else ()

    def measure(self, subject: "Subject") -> Result:
        """Score the held-out text; no figures if it was tokenized with another vocabulary."""
        job = subject.job
        if not have_same_vocabulary(job.inputs["model"], job.inputs["tokenizer"]):
            return Result(absent="the corpus was tokenized with another vocabulary than the model's")
        heldout = Split.open(job.inputs["shards"] / "heldout")
        window = self.window or min(DEFAULT_WINDOW, subject.decoder.context)
        figures = {
            "perplexity": perplexity(subject.decoder, heldout, window, f"{job.name} perplexity"),
            "bits_per_byte": bits_per_byte(heldout, window, subject.decoder.negative_log_likelihood),
        }
        return Result(figures, absent="" if any(figures.values()) else "the corpus has no held-out text")


def perplexity(decoder: Decoder, split: Split, window: int, desc: str | None = None) -> float | None:
    """Return exp of the mean negative log-likelihood per token on held-out text; None for less than one window."""
    count = len(split.tokens) // window
    if not count:
        return None
    rows = split.tokens[: count * window].reshape(count, window)
    return round(math.exp(sum(decoder.negative_log_likelihood(rows, desc)) / (count * (window - 1))), 4)
