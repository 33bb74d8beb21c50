"""Exact match: greedy replies to questions whose short answer is known, about seen and held-out entities."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tasks.common.evaluation.exact_match import Extractor, exact_match
from tasks.common.random_streams import Stream
from tasks.evaluate.evaluation import Evaluation, Facts, Mean, Result, answer_row, means_of

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

MEANS = {
    "exact_match_seen": Mean("greedy", "correct", "train", rate=True),
    "exact_match_heldout": Mean("greedy", "correct", "heldout", rate=True),
}


class ExactMatch(Evaluation):
    """Share of questions whose extracted answer equals the short answer of the data."""

    KIND: ClassVar[str] = "exact_match"
    APPLIES_TO: ClassVar[str] = "Causal models with a chat template, and conversations with a short `answer`."
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions",)
    USES_REPLIES: ClassVar[bool] = True

    kind: Literal["exact_match"] = Field(description="Kind of evaluation")

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return one rate per split."""
        return tuple(MEANS) if facts.instructions and facts.answers else ()

    def measure(self, subject: "Subject") -> Result:
        """Return a greedy reply to each question, with its exact match."""
        questions = subject.questions
        if not questions:
            return Result(dict.fromkeys(MEANS), absent="no question with a short answer leaves room for a reply")
        extractor = Extractor.learn(row for row in subject.table if row["split"] == "train")
        prompts = [row["messages"][:-1] for row in questions]
        replies = subject.replies(prompts, subject.max_new_tokens, 0.0, Stream.QUESTIONS, "questions")
        rows = []
        for row, reply in zip(questions, replies, strict=True):
            found = extractor.extract(reply, row["entity"])
            rows.append(answer_row(row, "greedy", reply, extracted=found, correct=exact_match(found, row["answer"])))
        subject.mark_seen_text(rows, prompts)
        figures, means = means_of(rows, MEANS)
        return Result(figures, rows, means=means)
