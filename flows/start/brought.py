"""What the user brings to a new project: a checkpoint, and tables of rows described by their sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.start.checkpoint import Checkpoint

CHARACTERS_PER_TOKEN = 3.5  # of English prose under a vocabulary of some ten thousand tokens


@dataclass(frozen=True)
class Table:
    """Rows of one kind: their number, characters per row (mean and the longest of those read), and their sources.

    A source is an item of `ingest.sources`; its `path` is relative to `data/sources/`.
    """

    rows: int
    mean_characters: float
    longest_characters: int
    sources: tuple[dict[str, Any], ...]
    task: Mapping[str, Any] = field(default_factory=dict)  # of labelled texts: the setting `task` of fine-tuning

    @property
    def tokens(self) -> float:
        """The approximate number of tokens of all rows."""
        return self.rows * self.mean_characters / CHARACTERS_PER_TOKEN


@dataclass(frozen=True)
class Brought:
    """Everything that the user brings, and what they want of it."""

    checkpoint: Checkpoint | None = None
    tables: dict[str, Table] = field(default_factory=dict)  # corpus | instructions | rankings | labels
    align: str = "ppo"  # ppo | dpo, where there are rankings and conversations
    encoder: bool = False  # a new model from text fills masks instead of continuing text

    def __contains__(self, table: str) -> bool:
        return table in self.tables
