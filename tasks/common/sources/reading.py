"""What a source gives: facts, prose, rated sentences, finished rows, and what could not be used with its reason."""

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tasks.common.sources.facts import Fact

Item = TypeVar("Item", contravariant=True)


@dataclass(frozen=True)
class Refusal:
    """A piece of a source that entered no table."""

    source: str
    row: str
    reason: str


@dataclass(frozen=True)
class Rated:
    """A text that several people rated; `group` names the collection it is compared within.

    A word by itself is always trained on and is never prose: what is held out, and what is read, are sentences.
    """

    text: str
    scores: list[float]
    prompt: str
    group: str
    source: str
    licence: str
    word: bool = False


class Sink(Protocol[Item]):
    """Where items go one by one: a list, or a file for more of them than memory holds."""

    def append(self, item: Item, /) -> None:
        """Take one item."""


@dataclass
class Reading:
    """Everything that was read from one source. `read` counts its rows; each is used or refused.

    Facts, ratings and finished rows are held here; prose and refusals go where the reader of the sources wants them.
    """

    source: str
    licence: str
    sha256: str = ""
    files: dict[str, str] = field(default_factory=dict)  # file or address to its sha256
    limit: int | None = None  # most characters of prose
    read: int = 0
    refusals: int = 0
    characters: int = 0
    full: bool = False
    facts: list[Fact] = field(default_factory=list)
    prose: Sink[str] = field(default_factory=list)
    rated: list[Rated] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refused: Sink[Refusal] = field(default_factory=list)

    def refuse(self, row: str, reason: str) -> None:
        """Keep a row aside with the reason why it is not used."""
        self.refusals += 1
        self.refused.append(Refusal(self.source, row, reason))

    def fact(self, kind: str, entity: str, relation: str, value: str) -> None:
        """Count and keep one fact."""
        self.read += 1
        self.facts.append(Fact(kind, entity, relation, value, self.source, self.licence))

    def tell(self, text: str) -> None:
        """Count and keep one piece of prose; what lies beyond the limit was not asked for and does not count."""
        self.full = self.full or (self.limit is not None and self.characters + len(text) > self.limit)
        if not self.full:
            self.read += 1
            self.characters += len(text)
            self.prose.append(text)

    def rate(self, text: str, scores: list[float], prompt: str, group: str, word: bool = False) -> None:
        """Count and keep one rated text."""
        self.read += 1
        self.rated.append(Rated(text, scores, prompt, group, self.source, self.licence, word))
