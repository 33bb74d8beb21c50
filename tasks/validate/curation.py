"""Curation: filters that reject rows of training text although each row is valid by itself, and mark personal data.

Order: personal data is marked first, so that every later filter sees the text that is kept. Then each row is checked
for its language, its quality (neither for code) and wordings of the evaluation. At the end rows are compared with each
other. Rows made from facts are alike by design, so only the filter for personal data applies to them: in the corpus the
rows with names, among the conversations those with an expected answer. Rankings are only marked.
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from tasks.common.settings import Settings
from tasks.common.text.words import words
from tasks.validate import contamination, personal, quality
from tasks.validate.checks import Features, Row, digest
from tasks.validate.contamination import Evaluation, HeldoutNgrams
from tasks.validate.near_duplicates import DuplicateFinder, ExactDuplicates, NearDuplicates
from tasks.validate.personal import Personal
from tasks.validate.quality import Language, Quality

DUPLICATE_REASON = "duplicate: the same words as prose that is kept"
NEAR_DUPLICATE_REASONS = {
    "corpus": "near-duplicate: nearly the words of prose that is kept",
    "instructions": "near-duplicate: nearly the words of a conversation that is kept",
}
Marks = Counter[str]  # number of marked spans by kind of personal data


class Curation(Settings):
    """The filters; null switches one off."""

    code: list[str] = Field(
        default=[],
        description="Sources, or groups of them, whose documents are code; the filters `language` and `quality` skip "
        "them",
    )
    personal: Personal | None = Field(default=Personal(), description="Personal data; null leaves it alone")
    language: Language | None = Field(default=None, description="Languages of prose to keep; null accepts all")
    quality: Quality | None = Field(default=None, description="Rules for running text; null applies none")
    evaluation: Evaluation | None = Field(
        default=Evaluation(), description="Decontamination against held-out questions; null disables it"
    )
    exact_duplicates: ExactDuplicates | None = Field(
        default=ExactDuplicates(), description="Filter for exact duplicates of prose; null disables it"
    )
    near_duplicates: NearDuplicates | None = Field(
        default=NearDuplicates(), description="Filter for near-duplicates; null disables it"
    )


class Curator:
    """Makes the filter of each table. Held-out instructions are read first, because the corpus is searched for them."""

    def __init__(self, settings: Curation) -> None:
        self.settings = settings
        self.heldout_ngrams = HeldoutNgrams(settings.evaluation) if settings.evaluation else None

    def make_table_filter(self, table: str) -> "TableFilter":
        """Return the filter of a table."""
        return TableFilter(table, self.settings, self.heldout_ngrams)


class TableFilter:
    """Filters one table batch by batch: marks personal data, rejects single rows, and compares all rows at the end."""

    def __init__(self, table: str, settings: Curation, heldout_ngrams: HeldoutNgrams | None) -> None:
        self.table, self.settings, self.heldout_ngrams = table, settings, heldout_ngrams
        self.marks: dict[int, Marks] = {}  # by position in the table
        self._code_sources = frozenset(settings.code)
        self._rows_read = 0
        self._duplicates = DuplicateFinder(
            settings.exact_duplicates if table == "corpus" else None, settings.near_duplicates
        )
        self._compared_positions = array("q")  # of the documents in `_duplicates`, in their order
        self._train_prompts: list[tuple[int, bytes]] = []  # position and digest
        self._heldout_prompts: set[bytes] = set()

    def mark_batch(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows of the next batch with personal data marked, and count the marks by position."""
        marked: list[Row] = []
        for position, row in enumerate(rows, self._rows_read):
            found: Marks = Counter()
            marked.append(mark_row(self.table, row, self.settings.personal, found))
            if found:
                self.marks[position] = found
        self._rows_read += len(rows)
        return marked

    def mark_uncounted(self, row: Row) -> Row:
        """Return a row with personal data marked; the marks are not counted again."""
        return mark_row(self.table, row, self.settings.personal, Counter())

    def filter_batch(
        self, rows: Sequence[Row], features: Sequence[Features], reasons: Sequence[str | None]
    ) -> list[str | None]:
        """Return the rejection reasons of the batch marked last: those given, and those of the filters."""
        result, documents, start = list(reasons), [], self._rows_read - len(rows)
        for number, (row, found) in enumerate(zip(rows, features, strict=True)):
            if result[number] is not None:
                continue
            text = found["text"]
            text_words = words(text) if is_natural_text(self.table, row) else []
            result[number] = self._rejection_reason(row, text, text_words)
            if result[number] is None:
                self._record_prompt(start + number, row)
                if text_words:
                    documents.append((text_words, row["split"] == "heldout"))
                    self._compared_positions.append(start + number)
        self._duplicates.add(documents)
        return result

    def _rejection_reason(self, row: Row, text: str, text_words: Sequence[str]) -> str | None:
        """Return why a row is rejected by itself, or None; `text_words` is empty for rows made from facts."""
        settings = self.settings
        kind = personal.rejected_kind(text, settings.personal) if settings.personal else None
        if kind:
            return f"personal data: {kind}"
        if self.table != "corpus" or not text_words:
            return None
        is_code = bool(self._code_sources & {row["source"], row["group"]})
        reason = None if is_code else self._prose_rejection_reason(text, text_words)
        ngrams = self.heldout_ngrams
        if reason is None and ngrams and row["split"] == "train" and ngrams.occur_in(text_words):
            return contamination.QUOTED_REASON
        return reason

    def _prose_rejection_reason(self, text: str, text_words: Sequence[str]) -> str | None:
        """Return why running text is rejected for its language or its quality, or None."""
        settings = self.settings
        reason = quality.language_rejection_reason(text, settings.language) if settings.language else None
        if reason is None and settings.quality:
            reason = quality.quality_rejection_reason(text, text_words, settings.quality)
        return reason

    def _record_prompt(self, position: int, row: Row) -> None:
        """Record the prompt of a conversation by its split; the n-grams of a held-out one are added too."""
        if self.heldout_ngrams is None or self.table != "instructions":
            return
        *prompt, reply = [message["content"] for message in row["messages"]]
        prompt_digest = digest(" ".join(words("\n".join(prompt))))
        if row["split"] == "heldout":
            self._heldout_prompts.add(prompt_digest)
            self.heldout_ngrams.add(prompt[-1], reply)
        else:
            self._train_prompts.append((position, prompt_digest))

    def compare_rows(self) -> dict[int, str]:
        """Return the rejection reasons, by position, that come from comparing rows with each other."""
        reasons = {
            position: contamination.REPEATED_PROMPT_REASON
            for position, prompt in self._train_prompts
            if prompt in self._heldout_prompts
        }
        if self._compared_positions:
            exact, near = self._duplicates.find_redundant()
            for position, is_exact, is_near in zip(self._compared_positions, exact, near, strict=True):
                if is_exact or is_near:
                    reasons.setdefault(position, DUPLICATE_REASON if is_exact else NEAR_DUPLICATE_REASONS[self.table])
        return reasons


def is_natural_text(table: str, row: Row) -> bool:
    """Return whether a row is prose or a conversation of people, and not a statement or chat made from facts."""
    if table == "corpus":
        return not row["names"]
    return table == "instructions" and row["answer"] is None


def mark_row(table: str, row: Row, settings: Personal | None, found: Marks) -> Row:
    """Return a row with personal data marked and its id unchanged, and count the marks by kind in `found`."""
    if settings is None:
        return row

    def mark_text(text: str | None) -> str | None:
        return personal.mark_text(text, settings, found) if text else text

    def mark_turns(messages: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
        return (
            None
            if messages is None
            else [turn and {**turn, "content": mark_text(turn["content"])} for turn in messages]
        )

    if table == "corpus":
        return {**row, "text": mark_text(row["text"])}
    if table == "instructions":
        # The reply contains the answer, so its marks are counted there.
        answer = row["answer"] and personal.mark_text(row["answer"], settings, Counter())
        return {**row, "answer": answer, "messages": mark_turns(row["messages"])}
    responses = None if row["responses"] is None else [mark_text(response) for response in row["responses"]]
    return {**row, "prompt": mark_turns(row["prompt"]), "responses": responses}
