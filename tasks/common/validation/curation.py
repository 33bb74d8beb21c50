"""Curation: what is taken out of training text although each row by itself is sound, and what is marked in it.

In order: personal data is marked (so that all that follows sees the text that will be kept), then each row is asked for
its language, its quality (code for neither) and the wordings of the evaluation, then rows are compared. Rows made from
facts are alike by design and are asked about nothing but personal data: in the corpus those with names, among the
conversations those with a stated answer. The others are prose, and conversations of people. Rankings are only marked.
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from tasks.common.settings import Settings
from tasks.common.validation import contamination, personal, quality
from tasks.common.validation.checks import Features, Row, digest
from tasks.common.validation.contamination import Evaluation, Wordings
from tasks.common.validation.near_duplicates import Duplicates, ExactDuplicates, NearDuplicates
from tasks.common.validation.personal import Personal
from tasks.common.validation.quality import Language, Quality
from tasks.common.validation.words import words

SAME = "duplicate: the same words as prose that is kept"
NEARLY = {
    "corpus": "near-duplicate: nearly the words of prose that is kept",
    "instructions": "near-duplicate: nearly the words of a conversation that is kept",
}
Marks = Counter[str]


class Curation(Settings):
    """The filters; null switches one off."""

    code: list[str] = Field(
        description="Sources, or groups of them, whose documents are code: neither their language is asked for nor the "
        "quality of running text"
    )
    personal: Personal | None = Field(description="Personal data; null leaves it alone")
    language: Language | None = Field(description="Languages of prose; null takes any")
    quality: Quality | None = Field(description="Rules for running text; null asks none")
    evaluation: Evaluation | None = Field(description="Wordings of the evaluation in training text; null lets them be")
    exact_duplicates: ExactDuplicates | None = Field(description="Prose with the words of other prose; null keeps it")
    near_duplicates: NearDuplicates | None = Field(description="Nearly the same text; null keeps it")


class Curator:
    """The filters at work on one table after the other; what instructions hold out is looked for in the corpus."""

    def __init__(self, settings: Curation) -> None:
        self.settings = settings
        self.wordings = Wordings(settings.evaluation) if settings.evaluation else None

    def look_at(self, table: str) -> "Look":
        """Return the filters' eye on a table."""
        return Look(table, self.settings, self.wordings)


class Look:
    """One table's rows, batch by batch: marks, reasons against single rows, and at the end those of comparing rows."""

    def __init__(self, table: str, settings: Curation, wordings: Wordings | None) -> None:
        self.table, self.settings, self.wordings = table, settings, wordings
        self.marks: dict[int, Marks] = {}  # by position in the table
        self._code = frozenset(settings.code)
        self._read = 0
        self._duplicates = Duplicates(
            settings.exact_duplicates if table == "corpus" else None, settings.near_duplicates
        )
        self._compared = array("q")  # positions of what was given to `_duplicates`, in order
        self._prompts: list[tuple[int, bytes]] = []  # of conversations for training
        self._asked: set[bytes] = set()  # prompts of the held-out side

    def mark(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows of the next batch with their personal data marked, and remember which those are."""
        marked: list[Row] = []
        for number, row in enumerate(rows, self._read):
            found: Marks = Counter()
            marked.append(mark_row(self.table, row, self.settings.personal, found))
            if found:
                self.marks[number] = found
        self._read += len(rows)
        return marked

    def marked(self, row: Row) -> Row:
        """Return a row with its personal data marked; what was found is not counted again."""
        return mark_row(self.table, row, self.settings.personal, Counter())

    def judge(self, rows: Sequence[Row], found: Sequence[Features], reasons: Sequence[str | None]) -> list[str | None]:
        """Return the reasons against the rows of the batch that was marked last, those of the filters added."""
        told, documents, start = list(reasons), [], self._read - len(rows)
        for number, (row, features) in enumerate(zip(rows, found, strict=True)):
            if told[number] is not None:
                continue
            text = features["text"]
            own = words(text) if made_by_people(self.table, row) else []
            told[number] = self._objection(row, text, own)
            if told[number] is None:
                self._hold_out(start + number, row)
                if own:
                    documents.append((own, row["split"] == "heldout"))
                    self._compared.append(start + number)
        self._duplicates.add(documents)
        return told

    def _objection(self, row: Row, text: str, own: Sequence[str]) -> str | None:
        """Return what speaks against a row by itself; `own` is empty for rows made from facts."""
        settings = self.settings
        kind = personal.refused_kind(text, settings.personal) if settings.personal else None
        if kind:
            return f"personal data: {kind}"
        if self.table != "corpus" or not own:
            return None
        told = None if self._code & {row["source"], row["group"]} else self._as_prose(text, own)
        if told is None and self.wordings and row["split"] == "train" and self.wordings.quoted_in(own):
            return contamination.QUOTED
        return told

    def _as_prose(self, text: str, own: Sequence[str]) -> str | None:
        """Return what speaks against running text: another language, or its quality."""
        settings = self.settings
        told = quality.language_objection(text, settings.language) if settings.language else None
        if told is None and settings.quality:
            told = quality.quality_objection(text, own, settings.quality)
        return told

    def _hold_out(self, position: int, row: Row) -> None:
        """Remember what a conversation asks, on either side of the split."""
        if self.wordings is None or self.table != "instructions":
            return
        *asked, reply = [message["content"] for message in row["messages"]]
        prompt = digest(" ".join(words("\n".join(asked))))
        if row["split"] == "heldout":
            self._asked.add(prompt)
            self.wordings.add(asked[-1], reply)
        else:
            self._prompts.append((position, prompt))

    def settle(self) -> dict[int, str]:
        """Return the reasons against rows, by position, that came out by comparing them with each other."""
        told = {position: contamination.ASKED_AGAIN for position, prompt in self._prompts if prompt in self._asked}
        if self._compared:
            same, nearly = self._duplicates.redundant()
            for position, is_same, is_near in zip(self._compared, same, nearly, strict=True):
                if is_same or is_near:
                    told.setdefault(position, SAME if is_same else NEARLY[self.table])
        return told


def made_by_people(table: str, row: Row) -> bool:
    """Say whether a row is prose or a conversation of people, not a statement or chat that was made from facts."""
    if table == "corpus":
        return not row["names"]
    return table == "instructions" and row["answer"] is None


def mark_row(table: str, row: Row, settings: Personal | None, found: Marks) -> Row:
    """Return a row with its personal data marked, its id unchanged, and count what was marked by kind."""
    if settings is None:
        return row

    def marked(text: str | None) -> str | None:
        return personal.marked(text, settings, found) if text else text

    def turns(messages: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
        return (
            None if messages is None else [turn and {**turn, "content": marked(turn["content"])} for turn in messages]
        )

    if table == "corpus":
        return {**row, "text": marked(row["text"])}
    if table == "instructions":
        # The answer stands in the reply and is counted there.
        answer = row["answer"] and personal.marked(row["answer"], settings, Counter())
        return {**row, "answer": answer, "messages": turns(row["messages"])}
    responses = None if row["responses"] is None else [marked(response) for response in row["responses"]]
    return {**row, "prompt": turns(row["prompt"]), "responses": responses}
