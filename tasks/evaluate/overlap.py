"""Overlap with references: chrF and ROUGE-L of greedy replies to held-out conversations, in any script."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.common.evaluation.scorecard import choose_any_questions
from tasks.common.random_streams import Stream
from tasks.common.text.words import split_words
from tasks.evaluate.evaluation import Evaluation, Facts, Mean, Result, answer_row, means_of
from tasks.evaluate.subject import ReplyRoomFilter

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

KIND = "overlap"
MEANS = {"chrf": Mean(KIND, "chrf"), "rouge_l": Mean(KIND, "rouge_l")}


class Overlap(Evaluation):
    """Overlap of greedy replies with the reference replies of held-out conversations."""

    KIND: ClassVar[str] = "overlap"
    APPLIES_TO: ClassVar[str] = "Causal models with a chat template, and held-out conversations, in any script."
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions",)
    USES_REPLIES: ClassVar[bool] = True

    kind: Literal["overlap"] = Field(description="Kind of evaluation")
    conversations: int = Field(default=100, description="Maximum number of held-out conversations", ge=1)

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return both measures."""
        return tuple(MEANS) if facts.instructions else ()

    def measure(self, subject: "Subject") -> Result:
        """Compare a greedy reply to each held-out prompt with its references."""
        has_room = ReplyRoomFilter(subject.decoder, subject.max_new_tokens)
        heldout = [row for row in subject.table if row["split"] == "heldout"]
        chosen = choose_any_questions(heldout, self.conversations, has_room)
        has_room.report_skipped(subject.job.name)
        if not chosen:
            return Result(absent="no held-out conversation leaves room for a reply")
        references: dict[str, list[str]] = {}
        for row in heldout:
            references.setdefault(repr(row["messages"][:-1]), []).append(row["messages"][-1]["content"])
        prompts = [row["messages"][:-1] for row in chosen]
        replies = subject.replies(prompts, subject.max_new_tokens, 0.0, Stream.OVERLAP, "references")
        rows = []
        for row, reply in zip(chosen, replies, strict=True):
            known = list(dict.fromkeys(references[repr(row["messages"][:-1])]))
            own = {"chrf": chrf(reply, known), "rouge_l": rouge_l(reply, known), "reference": known[0]}
            rows.append(answer_row(row, KIND, reply) | own)
        subject.mark_seen_text(rows, prompts)
        figures, means = means_of(rows, MEANS)
        return Result(figures, rows, means=means, details={"conversations": len(rows)})


def chrf(reply: str, references: Sequence[str]) -> float:
    """Return the chrF of a reply (Popović 2015; sacrebleu), from 0 to 1, with the closest reference."""
    from sacrebleu.metrics.chrf import CHRF

    return round(float(CHRF().sentence_score(reply, list(references)).score) / 100, 6)


def rouge_l(reply: str, references: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of words (Lin 2004; rouge-score), with the closest reference."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return round(float(scorer.score_multi(list(references), reply)["rougeL"].fmeasure), 6)


class Words:
    """Tokenizer for rouge-score, whose own one drops everything but Latin letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text in lower case without the punctuation around them, in any script."""
        pieces = ("".join(filter(_is_word_part, piece)) for piece in split_words(text.casefold()))
        return [piece for piece in pieces if piece]


def _is_word_part(character: str) -> bool:
    """Return whether a character is a letter, a mark of one (as Devanagari's vowels) or a digit."""
    return unicodedata.category(character)[0] in "LMN"
