"""What a source gives: facts, prose, rated sentences, finished rows, and what could not be used with its reason."""

from dataclasses import dataclass, field
from typing import Any

from tasks.common.facts import Fact


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


@dataclass
class Reading:
    """Everything that was read from one source. `read` counts its rows; each is used or refused."""

    source: str
    licence: str
    sha256: str
    read: int = 0
    facts: list[Fact] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)
    rated: list[Rated] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)

    def refuse(self, row: str, reason: str) -> None:
        """Keep a row aside with the reason why it is not used."""
        self.refused.append(Refusal(self.source, row, reason))

    def fact(self, kind: str, entity: str, relation: str, value: str) -> None:
        """Count and keep one fact."""
        self.read += 1
        self.facts.append(Fact(kind, entity, relation, value, self.source, self.licence))

    def tell(self, text: str) -> None:
        """Count and keep one piece of prose."""
        self.read += 1
        self.prose.append(text)

    def rate(self, text: str, scores: list[float], prompt: str, group: str, word: bool = False) -> None:
        """Count and keep one rated text."""
        self.read += 1
        self.rated.append(Rated(text, scores, prompt, group, self.source, self.licence, word))
