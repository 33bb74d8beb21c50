"""The corpus while `ingest` makes it: documents come in any order and number, and leave sorted and each but once.

Nothing of it is held whole: documents are sorted on disk (`sorting.py`), and two with the same text, which have the
same id, meet there. The order is that of the ids, which are hashes, so the head of the table is a fair sample.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tasks.common import draw, tables
from tasks.common.sources.reading import Refusal
from tasks.common.sources.sorting import Sorter

# Of documents with the same text the one of the lowest rank stays. That a rated sentence is told elsewhere is no fault.
STATEMENT, PROSE, RATED = range(3)
ROW_BYTES = 200  # of a row beside its text, about


class Corpus:
    """Takes documents and writes the table of those that differ."""

    def __init__(self, folder: Path, salt: str, heldout: float) -> None:
        self.salt, self.heldout = salt, heldout
        self.schema = tables.schema("corpus")
        self.sorter = Sorter(folder, self.schema)

    def statements(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add finished rows, each of another id."""
        for row in rows:
            self.sorter.add(row, len(row["text"]) + ROW_BYTES, STATEMENT)

    def prose(self, text: str, told: "Teller", rank: int = PROSE) -> None:
        """Add a text without names; a hash of it decides whether it is held out."""
        identifier = draw.short_id("corpus", text)
        where = draw.split(self.heldout, self.salt, "prose", identifier)
        row: dict[str, Any] = {"id": identifier, "text": text, "names": [], **told.columns, "split": where}
        self.sorter.add(row, len(text) + ROW_BYTES, rank)

    def write(self, path: Path, refuse: Callable[[str, str], None]) -> Counter[tuple[str, str]]:
        """Write the table, give `refuse` source and text of prose that came before, and count (source, split)."""
        import pyarrow as pa

        counts: Counter[tuple[str, str]] = Counter()
        with tables.Writer(path, self.schema) as writer:
            for rows in self.sorter:
                ids = rows["id"].to_numpy()
                again = np.concatenate([[False], ids[1:] == ids[:-1]])
                told = again & (self.sorter.ranks(rows) == PROSE)
                for row in rows.select(["source", "text"]).filter(pa.array(told)).to_pylist():
                    refuse(row["source"], row["text"])
                kept = rows.filter(pa.array(~again)).select(self.schema.names)
                counts.update(zip(kept["source"].to_pylist(), kept["split"].to_pylist(), strict=True))
                writer.write(kept)
        return counts


@dataclass(frozen=True)
class Teller:
    """Where a source's prose goes: to the corpus, with the source's name, group and licence."""

    corpus: Corpus
    source: str
    group: str | None
    licence: str

    @property
    def columns(self) -> dict[str, str | None]:
        """What stands in each of the source's rows."""
        return {"source": self.source, "group": self.group, "licence": self.licence}

    def append(self, text: str) -> None:
        """Take one text."""
        self.corpus.prose(text, self)


class RefusedFile:
    """Where refused pieces go: to a file, one a line, as they come."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def append(self, refusal: Refusal) -> None:
        """Take one refused piece; half a character, for which some are refused, is spelt out."""
        told = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in asdict(refusal).items()}
        self.file.write(json.dumps(told, ensure_ascii=False) + "\n")

    def __enter__(self) -> "RefusedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.file.close()
