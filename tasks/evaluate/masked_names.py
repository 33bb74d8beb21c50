"""Masked names: the names that a masked model predicts for the first name of statements."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from serving.names import MASK, Candidates, log_scores, make_codec, single_slot
from tasks.common import tables
from tasks.evaluate.encoders_under_test import Encoder
from tasks.evaluate.evaluation import Evaluation, Facts, Mean, Result, Row, means_of

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

MEANS = {"masked_names": Mean("masked", "correct", "train", rate=True)}


class MaskedNames(Evaluation):
    """Share of statements whose masked first name is the likeliest of all names."""

    KIND: ClassVar[str] = "masked_names"
    APPLIES_TO: ClassVar[str] = "Masked models, and a corpus with names."
    MODELS: ClassVar[tuple[str, ...]] = ("masked",)
    INPUTS: ClassVar[tuple[str, ...]] = ("corpus",)

    kind: Literal["masked_names"] = Field(description="Kind of evaluation")
    statements: str = Field(
        default=".*", description="Regular expression of the statements whose first name is masked", min_length=1
    )

    @field_validator("statements")
    @classmethod
    def _validate_statements(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"it should be a Python regular expression ({error})") from None
        return value

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the rate and the numbers that it is of."""
        return (*MEANS, "masked_statements", "candidates") if facts.corpus else ()

    def measure(self, subject: "Subject") -> Result:
        """Return the predicted name of each statement that has a name."""
        corpus = tables.read(subject.job.inputs["corpus"], "train").to_pylist()
        names = sorted({name for row in corpus for name in row["names"]})
        masked = mask_first_name([
            row for row in corpus if row["names"] and re.fullmatch(self.statements, row["text"])
        ])  # fmt: skip
        predictions = best_names(subject.encoder, names, [text for _, text, _ in masked], subject.job.name)
        rows = [
            {
                "id": row["id"], "entity": name, "split": row["split"], "kind": "masked", "question": text,
                "reply": predicted, "extracted": predicted, "reference": name, "correct": predicted == name,
            }
            for (row, text, name), predicted in zip(masked, predictions, strict=True)
        ]  # fmt: skip
        figures, means = means_of(rows, MEANS)
        figures |= {"masked_statements": len(rows), "candidates": len(names)}
        return Result(figures, rows, means=means, absent="" if rows else "no statement of the corpus has a name")


def best_names(encoder: Encoder, names: Sequence[str], texts: Sequence[str], desc: str) -> list[str]:
    """Return the likeliest name for the one [MASK] of each text.

    Texts run one at a time, as in the service: with INT8 the scores of a text depend on the other texts of its batch.
    """
    from tqdm import tqdm

    if not texts:
        return []
    codec = make_codec(encoder.tokenizer, encoder.special_ids)
    candidates = Candidates(names, codec)
    slots = (single_slot(text, codec) for text in tqdm(texts, desc=desc, mininterval=2))
    return [names[log_scores(encoder.logits, codec, candidates, [slot])[0].argmax()] for slot in slots]


def mask_first_name(statements: Sequence[Row]) -> list[tuple[Row, str, str]]:
    """Return (row, text with [MASK], masked name) for statements whose first name occurs only once."""
    result = []
    for row in statements:
        first = min(row["names"], key=lambda name: (row["text"].find(name) % 2**31, -len(name)))
        if row["text"].count(first) == 1:
            result.append((row, row["text"].replace(first, MASK), first))
    return result
