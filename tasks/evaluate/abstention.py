"""Abstention: questions out of a model's scope must be declined, questions within it must not.

Out-of-scope questions come from a file of the user's, in-scope ones are held-out conversations of the data whose
reference reply declines nothing. How a refusal is recognised is a setting: regular expressions.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from tasks.common import stable_hash
from tasks.common.evaluation.scorecard import choose_any_questions
from tasks.common.random_streams import Stream
from tasks.evaluate.evaluation import Evaluation, Facts, Mean, Result, Row, answer_row, means_of
from tasks.evaluate.harness import FOLDER
from tasks.evaluate.subject import ReplyRoomFilter

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

OUT_OF_SCOPE, IN_SCOPE = "out_of_scope", "in_scope"
MEANS = {
    "abstained_out_of_scope": Mean(OUT_OF_SCOPE, "correct", rate=True),
    "abstained_in_scope": Mean(IN_SCOPE, "correct", rate=True),
}
REFUSALS = [
    r"\bI (do not|don['’]t) (know|have (any |that )?(information|knowledge))\b",
    r"\bI (cannot|can['’]t|can not|could not|couldn['’]t) ",
    r"\bI( am|['’]m) (not able|unable) to ",
    r"\bI only (know|answer)\b",
]


class Abstention(Evaluation):
    """Share of questions that a model declines, out of scope and in scope."""

    KIND: ClassVar[str] = "abstention"
    APPLIES_TO: ClassVar[str] = (
        "Causal models with a chat template, a file of out-of-scope questions, and held-out conversations as in-scope "
        "ones."
    )
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions", "evaluation")
    USES_REPLIES: ClassVar[bool] = True

    kind: Literal["abstention"] = Field(description="Kind of evaluation")
    questions: str = Field(
        description="File in data/sources/evaluation with the out-of-scope questions: JSON lines with `question`, or "
        ".txt with one per line"
    )
    in_scope: int = Field(default=200, description="Maximum number of in-scope questions", ge=1)
    refusals: list[str] = Field(
        default=REFUSALS, description="Regular expressions, one of which matches a reply that declines", min_length=1
    )

    @field_validator("questions")
    @classmethod
    def _validate_questions(cls, path: str) -> str:
        """Read the file now: the stage itself runs only after all models are trained."""
        if not path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"the path must be relative to {FOLDER}/ and inside it, so that DVC tracks the file")
        read_questions(FOLDER / path)
        return path

    @field_validator("refusals")
    @classmethod
    def _validate_refusals(cls, refusals: list[str]) -> list[str]:
        for pattern in refusals:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} should be a Python regular expression ({error})") from None
        return refusals

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the rate out of scope and, with conversations, in scope."""
        return tuple(MEANS) if facts.instructions else (next(iter(MEANS)),)

    def declines(self, reply: str) -> bool:
        """Return whether a reply declines to answer."""
        return any(re.search(pattern, reply, re.IGNORECASE) for pattern in self.refusals)

    def measure(self, subject: "Subject") -> Result:
        """Ask both kinds of questions greedily."""
        has_room = ReplyRoomFilter(subject.decoder, subject.max_new_tokens)
        asked = read_questions(subject.job.inputs["evaluation"] / self.questions)
        outside = list(filter(has_room, (_as_row(question) for question in asked)))
        answerable = [
            row for row in subject.table
            if row["split"] == "heldout" and not self.declines(row["messages"][-1]["content"])
        ]  # fmt: skip
        inside = choose_any_questions(answerable, self.in_scope, has_room)
        has_room.report_skipped(subject.job.name)
        prompts = [row["messages"][:-1] for row in (*outside, *inside)]
        replies = subject.replies(prompts, subject.max_new_tokens, 0.0, Stream.ABSTENTION, "abstention")
        kinds = [OUT_OF_SCOPE] * len(outside) + [IN_SCOPE] * len(inside)
        rows = [
            answer_row(row, kind, reply, correct=self.declines(reply))
            for row, kind, reply in zip((*outside, *inside), kinds, replies, strict=True)
        ]
        figures, means = means_of(rows, MEANS)
        absent = "" if rows else "no question leaves room for a reply, or the model has no chat template"
        details = {"out_of_scope": len(outside), "in_scope": len(inside), "too_long": len(has_room.too_long)}
        return Result(figures, rows, means=means, details=details, absent=absent)


def read_questions(path: Path) -> list[str]:
    """Return the distinct questions of a file; raise ValueError if it is missing, malformed or empty."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it should contain out-of-scope questions, one per line")
    found: dict[str, None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            found[_read_line(path, number, line.strip())] = None
    if not found:
        raise ValueError(f"{path} is empty; it should contain out-of-scope questions, one per line")
    return list(found)


def _read_line(path: Path, number: int, line: str) -> str:
    if path.suffix == ".txt":
        return line
    try:
        question = json.loads(line)["question"]
    except (ValueError, LookupError, TypeError):
        question = None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'{path}, line {number}: expected {{"question": "a text"}}, found {line[:60]!r}')
    return question.strip()


def _as_row(question: str) -> Row:
    """Return a question as a row of the instructions table without an answer."""
    name = stable_hash.short_id("abstention", question)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
    return {"id": name, "entity": question, "split": "heldout", "messages": messages, "answer": None}
