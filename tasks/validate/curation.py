"""Curation: filters that reject rows of training text although each row is valid by itself, and mark personal data.

Order: personal data is marked first (not in code), so that every later filter sees the text that is kept. Then each
row is checked for its language, its quality (neither for code) and wordings of the evaluation. At the end rows are
compared with each other. Rows made from facts are alike by design, so only the filter for personal data applies to
them: in the corpus the rows with names, among the conversations those with an expected answer. Rankings are only
marked.
"""

from array import array
from collections.abc import Sequence

from pydantic import Field, field_validator

from tasks.common.settings import Settings
from tasks.common.text.words import words
from tasks.validate import contamination, languages, personal, quality
from tasks.validate.checks import Features, Row, digest
from tasks.validate.contamination import Evaluation, HeldoutNgrams
from tasks.validate.languages import Language
from tasks.validate.near_duplicates import DuplicateFinder, ExactDuplicates, NearDuplicates
from tasks.validate.personal import Personal
from tasks.validate.preparation import Changes, is_code, prepare_row
from tasks.validate.quality import Quality

DUPLICATE_REASON = "duplicate: the same words as prose that is kept"
NEAR_DUPLICATE_REASONS = {
    "corpus": "near-duplicate: nearly the words of prose that is kept",
    "instructions": "near-duplicate: nearly the words of a conversation that is kept",
}


class Curation(Settings):
    """The filters; null switches one off."""

    code: list[str] = Field(
        default=[],
        description="Sources, or groups of them, of code or commands; the filters `personal`, `language` and `quality` "
        "skip their documents, conversations and rankings",
    )
    languages: dict[str, str] = Field(
        default={},
        description="ISO 639 code of the language of a source, or of a group; the language of other documents is "
        "identified",
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

    @field_validator("languages")
    @classmethod
    def _validate_languages(cls, found: dict[str, str]) -> dict[str, str]:
        languages.check_codes(found.values())
        return found


class Curator:
    """Makes the filter of each table. Held-out instructions are read first, because the corpus is searched for them."""

    def __init__(self, settings: Curation) -> None:
        self.settings = settings
        self.heldout_ngrams = HeldoutNgrams(settings.evaluation) if settings.evaluation else None

    def make_table_filter(self, table: str) -> "TableFilter":
        """Return the filter of a table."""
        return TableFilter(table, self.settings, self.heldout_ngrams)


class TableFilter:
    """Filters one table batch by batch: prepares rows, rejects single ones, and compares all rows at the end."""

    def __init__(self, table: str, settings: Curation, heldout_ngrams: HeldoutNgrams | None) -> None:
        self.table, self.settings, self.heldout_ngrams = table, settings, heldout_ngrams
        self.changes: dict[int, Changes] = {}  # by position in the table
        self._languages = array("B")  # by position: number of the document's language in `_codes`
        self._codes: list[str | None] = [None]
        self._code_sources = frozenset(settings.code)
        self._rows_read = 0
        self._duplicates = DuplicateFinder(
            settings.exact_duplicates if table == "corpus" else None, settings.near_duplicates
        )
        self._compared_positions = array("q")  # of the documents in `_duplicates`, in their order
        self._train_prompts: list[tuple[int, bytes]] = []  # position and digest
        self._heldout_prompts: set[bytes] = set()

    def prepare_batch(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows of the next batch as they are checked and kept, and record their changes by position."""
        prepared: list[Row] = []
        for position, row in enumerate(rows, self._rows_read):
            changes = Changes()
            prepared.append(self.prepare(row, changes))
            if changes:
                self.changes[position] = changes
        self._rows_read += len(rows)
        self._languages.extend([0] * len(rows))
        return prepared

    def language_of(self, position: int) -> str | None:
        """Return the language of the document at a position, or None if no filter asked for it."""
        return self._codes[self._languages[position]]

    def prepare(self, row: Row, changes: Changes) -> Row:
        """Return a row as it is checked and kept, and add what was changed to `changes`."""
        return prepare_row(self.table, row, self.settings.personal, self._code_sources, changes)

    def filter_batch(
        self, rows: Sequence[Row], features: Sequence[Features], reasons: Sequence[str | None]
    ) -> list[str | None]:
        """Return the rejection reasons of the batch prepared last: those given, and those of the filters."""
        result, compared, start = list(reasons), [], self._rows_read - len(rows)
        for number, (row, found) in enumerate(zip(rows, features, strict=True)):
            if result[number] is not None:
                continue
            parts = split_parts(self.table, row)
            result[number] = self._rejection_reason(start + number, row, found["text"], parts)
            if result[number] is None:
                self._record_prompt(start + number, row)
                if parts:
                    compared.append((parts, row["split"] == "heldout"))
                    self._compared_positions.append(start + number)
        if self.table == "corpus":
            self._duplicates.add([(document, heldout) for (document,), heldout in compared])
        else:
            self._duplicates.add_conversations(compared)
        return result

    def _rejection_reason(self, position: int, row: Row, text: str, parts: Sequence[Sequence[str]]) -> str | None:
        """Return why a row is rejected by itself, or None; `parts` is empty for rows made from facts."""
        settings, code = self.settings, is_code(row, self._code_sources)
        kind = personal.rejected_kind(text, settings.personal) if settings.personal and not code else None
        if kind:
            return f"personal data: {kind}"
        if self.table != "corpus" or not parts:
            return None
        (text_words,) = parts
        reason = None if code else self._prose_rejection_reason(position, row, text, text_words)
        ngrams = self.heldout_ngrams
        if reason is None and ngrams and row["split"] == "train" and ngrams.occur_in(text_words):
            return contamination.QUOTED_REASON
        return reason

    def _prose_rejection_reason(self, position: int, row: Row, text: str, text_words: Sequence[str]) -> str | None:
        """Return why running text is rejected for its language or its quality, or None; record its language."""
        settings = self.settings
        if settings.language is None and settings.quality is None:
            return None
        declared = settings.languages.get(row["source"]) or settings.languages.get(row["group"] or "")
        language, reason = languages.find_language(text, declared, settings.language)
        code = language or languages.UNDETERMINED
        if code not in self._codes:
            self._codes.append(code)
        self._languages[position] = self._codes.index(code)
        if reason is None and settings.quality:
            rules = languages.rules_of(language) if language else languages.NEUTRAL_RULES
            reason = quality.quality_rejection_reason(text, text_words, settings.quality, rules)
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


def split_parts(table: str, row: Row) -> list[list[str]]:
    """Return the words of each part of a row: of a document, or of each message but the system's.

    Rows made from facts have none, nor have rankings, nor documents without a word.
    """
    if table == "corpus":
        found = [] if row["names"] else words(row["text"])
        return [found] if found else []
    if table == "instructions" and row["answer"] is None:
        return [words(turn["content"]) for turn in row["messages"] if turn["role"] != "system"]
    return []
