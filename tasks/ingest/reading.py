"""The content of one source: facts, prose, rated texts, finished rows, and rejected rows with their reasons."""

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tasks.ingest.facts import Fact

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

    Facts, rated texts and finished rows are kept in memory; prose and rejections go to the sinks.
    """

    source: str
    licence: str
    sha256: str = ""
    files: dict[str, str] = field(default_factory=dict)  # file or address to its sha256
    max_characters: int | None = None  # of prose; None for no limit
    rows_read: int = 0
    rejections: int = 0
    characters: int = 0  # of prose
    limit_reached: bool = False
    facts: list[Fact] = field(default_factory=list)
    prose: Sink[str] = field(default_factory=list)
    rated: list[RatedText] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # finished rows by table
    rejected: Sink[Rejection] = field(default_factory=list)

    def reject(self, row: str, reason: str) -> None:
        """Reject a row with a reason."""
        self.rejections += 1
        self.rejected.append(Rejection(self.source, row, reason))

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
