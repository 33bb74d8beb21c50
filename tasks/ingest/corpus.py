"""Builds the corpus table: collects documents in any order, and writes them sorted by id and deduplicated.

The corpus need not fit into memory: documents are sorted on disk (`sorting.py`). Documents with the same text have the
same id, so they are adjacent after sorting. Ids are hashes, so the head of the table is a random sample.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tasks.common import stable_hash, tables
from tasks.ingest.reading import Rejection
from tasks.ingest.sorting import Sorter, write_distinct

if TYPE_CHECKING:
    import pyarrow as pa

# Of documents with the same text, the one of the lowest rank is kept. Only prose is rejected as a duplicate: a rated
# sentence is used in its ranking even if the corpus has its text already.
STATEMENT_RANK, PROSE_RANK, RATED_RANK = range(3)
ROW_BYTES = 200  # approximate size of a row without its text


class Corpus:
    """Collects documents and writes the table of the distinct ones."""

    def __init__(self, folder: Path, salt: str, heldout: float) -> None:
        self.salt, self.heldout = salt, heldout
        self.schema = tables.schema("corpus")
        self.sorter = Sorter(folder, self.schema)

    def add_statements(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add finished rows with distinct ids."""
        for row in rows:
            self.sorter.add(row, len(row["text"]) + ROW_BYTES, STATEMENT_RANK)

    def add_prose(self, text: str, sink: "ProseSink", rank: int = PROSE_RANK) -> None:
        """Add a text without names; its hash decides whether it is held out."""
        identifier = stable_hash.short_id("corpus", text)
        split = stable_hash.split(self.heldout, self.salt, "prose", identifier)
        row: dict[str, Any] = {"id": identifier, "text": text, "names": [], **sink.columns, "split": split}
        self.sorter.add(row, len(text) + ROW_BYTES, rank)

    def write(self, path: Path, reject: Callable[[str, str], None]) -> Counter[tuple[str, str]]:
        """Write the table, call `reject(source, text)` for duplicate prose, and count the rows by (source, split)."""

        def reject_prose(rows: "pa.Table") -> None:
            for row in rows.select(["source", "text"]).to_pylist():
                reject(row["source"], row["text"])

        return write_distinct(self.sorter, path, self.schema, PROSE_RANK, reject_prose, lambda rows: rows)


@dataclass(frozen=True)
class ProseSink:
    """Adds the prose of one source to the corpus, with the name, group and licence of the source."""

    corpus: Corpus
    source: str
    group: str | None
    licence: str

    @property
    def columns(self) -> dict[str, str | None]:
        """Columns with the same value in all rows of the source."""
        return {"source": self.source, "group": self.group, "licence": self.licence}

    def append(self, text: str) -> None:
        """Add one text."""
        self.corpus.add_prose(text, self)


class RejectedFile:
    """A JSON Lines file of rejected rows."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def append(self, rejection: Rejection) -> None:
        """Write one rejected row; lone surrogates, a reason for rejection, are written as escape codes."""
        columns = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in asdict(rejection).items()}
        self.file.write(json.dumps(columns, ensure_ascii=False) + "\n")

    def __enter__(self) -> "RejectedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.file.close()
