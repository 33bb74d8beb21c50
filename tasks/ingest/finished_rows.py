"""Builds the tables instructions and rankings: collects finished rows, and writes them sorted by id and deduplicated.

They need not fit into memory: rows are sorted on disk (`sorting.py`). A hash of the entity or the prompt decides the
split of a row that states none.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import stable_hash, tables
from tasks.ingest.sorting import Sorter, write_distinct

if TYPE_CHECKING:
    import pyarrow as pa

# Rows made from facts and rated texts come first; of rows with the same id, the first is kept.
MADE_RANK, SOURCE_RANK = range(2)
ROW_BYTES = 400  # approximate size of a row without its texts


class FinishedRows:
    """Collects the rows of one table and writes the distinct ones."""

    def __init__(self, folder: Path, table: str, salt: str, heldout: float) -> None:
        self.table, self.salt, self.heldout = table, salt, heldout
        self.schema = tables.schema(table)
        self.sorter = Sorter(folder, self.schema)
        # A split that one conversation states applies to all with its entity, wherever they are.
        self.stated: dict[str, str] = {}

    def add_made(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows with distinct ids that are made from facts or rated texts."""
        for row in rows:
            self.sorter.add(row, _size(row), MADE_RANK)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row of a source."""
        if self.table == "instructions" and row["split"]:
            self.stated[_key(row["entity"])] = row["split"]
        self.sorter.add(row, _size(row), SOURCE_RANK)

    def write(self, path: Path, reject: Callable[[str, str], None]) -> Counter[tuple[str, str]]:
        """Write the table, call `reject(source, row)` for duplicates, and count the rows by (source, split)."""

        def reject_rows(rows: "pa.Table") -> None:
            for row in rows.select(self.schema.names).to_pylist():
                reject(row["source"], json.dumps(row, ensure_ascii=False))

        return write_distinct(self.sorter, path, self.schema, SOURCE_RANK, reject_rows, self._with_splits)

    def _with_splits(self, rows: "pa.Table") -> "pa.Table":
        """Return the rows with a split in each."""
        import pyarrow as pa

        column = "entity" if self.table == "instructions" else "prompt"
        pairs = zip(rows[column].to_pylist(), rows["split"].to_pylist(), strict=True)
        splits = [split or self._decide(value) for value, split in pairs]
        return rows.set_column(rows.schema.get_field_index("split"), "split", pa.array(splits, pa.string()))

    def _decide(self, value: Any) -> str:
        if self.table == "instructions":
            stated, parts = self.stated.get(_key(value)) if self.stated else None, ["entity", value]
        else:
            stated, parts = None, [self.table, *(turn["content"] for turn in value)]
        return stated or stable_hash.split(self.heldout, self.salt, *parts)


def _key(entity: str) -> str:
    return stable_hash.short_id("stated", entity)


def _size(row: Mapping[str, Any]) -> int:
    turns = row["messages"] if "messages" in row else row["prompt"]
    texts = [*(turn["content"] for turn in turns), *row.get("responses", ())]
    return ROW_BYTES + sum(map(len, texts))
