"""The content of one source: facts, prose, rated texts, finished rows, and rejected rows with their reasons."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tasks.ingest.facts import Fact

NAMED_FILES = 3  # in a note
Item = TypeVar("Item", contravariant=True)


@dataclass(frozen=True)
class Rejection:
    """A row of a source that entered no table, with the reason."""

    source: str
    row: str
    reason: str


@dataclass(frozen=True)
class RatedText:
    """A text that several people rated; it is compared with the others of its `group`.

    A single word (`word`) is always in the training split and never in the corpus.
    """

    text: str
    scores: list[float]
    prompt: str
    group: str
    source: str
    licence: str
    word: bool = False


class Sink(Protocol[Item]):
    """A target that items are appended to: a list, or a file for more items than fit into memory."""

    def append(self, item: Item, /) -> None:
        """Add one item."""


@dataclass
class Reading:
    """The content read from one source. `rows_read` counts its rows; each is used or rejected.

    Facts and rated texts are kept in memory; prose, finished rows and rejections go to the sinks.
    """

    source: str
    licence: str
    sha256: str = ""
    files: dict[str, str] = field(default_factory=dict)  # file or address to its sha256
    max_characters: int | None = None  # of prose; None for no limit
    rows_read: int = 0
    rejections: int = 0
    first_reason: str = ""  # of a rejection
    characters: int = 0  # of prose
    limit_reached: bool = False
    facts: list[Fact] = field(default_factory=list)
    prose: Sink[str] = field(default_factory=list)
    rated: list[RatedText] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)  # of the first rows, as the files call them
    mapped: dict[str, str] = field(default_factory=dict)  # columns that were taken from others without being told
    rows: Mapping[str, Sink[dict[str, Any]]] = field(  # finished rows by table
        default_factory=lambda: {"instructions": [], "rankings": []}
    )
    rejected: Sink[Rejection] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)  # number of files by format
    notes: Counter[str] = field(default_factory=Counter)  # what to know about how it was read: number of files
    noted: dict[str, list[str]] = field(default_factory=dict)  # the first files of each note

    def reject(self, row: str, reason: str) -> None:
        """Reject a row with a reason."""
        self.rejections += 1
        self.first_reason = self.first_reason or reason
        self.rejected.append(Rejection(self.source, row, reason))

    def reject_file(self, label: str, reason: str) -> None:
        """Count and reject a file that cannot be read."""
        self.rows_read += 1
        self.reject(label, reason)
        self.note("could not be read; data/ingest/rejected.jsonl gives the reasons", label)

    def note(self, text: str, label: str) -> None:
        """Note something that a user should know about how a file was read."""
        self.notes[text] += 1
        if self.notes[text] <= NAMED_FILES:
            self.noted.setdefault(text, []).append(label)

    def note_format(self, file_format: str, layout: str, columns: Mapping[str, str], label: str) -> None:
        """Note the format that a file was read in, and the columns that were taken for others."""
        self.mapped |= columns
        self.formats[file_format if layout == "columns" else f"{layout} ({file_format})"] += 1
        if columns:
            taken = ", ".join(f"{name} is {found}" for name, found in sorted(columns.items()))
            self.note(f"read as {layout}, where {taken}", label)

    def describe_notes(self) -> list[str]:
        """Return each note as a sentence about its first files."""
        sentences = []
        for text, count in self.notes.items():
            others = f" and {count - NAMED_FILES} more files" if count > NAMED_FILES else ""
            sentences.append(f"{', '.join(self.noted[text])}{others}: {text}")
        return sentences

    def add_fact(self, kind: str, entity: str, relation: str, value: str) -> None:
        """Add and count one fact."""
        self.rows_read += 1
        self.facts.append(Fact(kind, entity, relation, value, self.source, self.licence))

    def add_prose(self, text: str) -> None:
        """Add and count one text of prose; texts beyond the limit are ignored and not counted."""
        limit = self.max_characters
        self.limit_reached = self.limit_reached or (limit is not None and self.characters + len(text) > limit)
        if not self.limit_reached:
            self.rows_read += 1
            self.characters += len(text)
            self.prose.append(text)

    def add_rated_text(self, text: str, scores: list[float], prompt: str, group: str, word: bool = False) -> None:
        """Add and count one rated text."""
        self.rows_read += 1
        self.rated.append(RatedText(text, scores, prompt, group, self.source, self.licence, word))
