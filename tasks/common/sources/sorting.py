"""Sorting more rows than memory holds: rows come in any order and leave sorted by id, those of one id side by side.

An id is a hash in hex, so its first digits deal rows evenly into 256 buckets. Rows are spilled to disk whenever enough
of them wait, a run at a time with a batch a bucket; then the buckets are read one after the other, each small enough
to be sorted in memory. One that is not is dealt out again by the next two digits.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

SPILL_BYTES = 2**24  # rows that wait in memory before they are spilled
BUCKET_BYTES = 2**26  # the largest bucket that is sorted in memory
RANK_BITS = 56  # of the column `came`, below which rows are counted
DIGITS = 2
BUCKETS = 16**DIGITS


class Sorter:
    """Takes rows of one schema, which must hold `id`, 16 hex digits, and gives them back in order."""

    def __init__(self, folder: Path, schema: "pa.Schema", depth: int = 0) -> None:
        import pyarrow as pa

        folder.mkdir(parents=True)
        self.folder, self.depth = folder, depth
        self.schema = schema if "came" in schema.names else schema.append(pa.field("came", pa.int64()))
        self.sizes = np.zeros(BUCKETS, dtype=np.int64)
        self._rows: list[dict[str, Any]] = []
        self._waiting, self._came, self._runs = 0, 0, 0

    def add(self, row: Mapping[str, Any], size: int, rank: int = 0) -> None:
        """Take one row of about `size` bytes; of rows with one id those of a lower rank come first."""
        self._rows.append({**row, "came": rank << RANK_BITS | self._came})
        self._came += 1
        self._waiting += size
        if self._waiting > SPILL_BYTES:
            self._spill_rows()

    def __iter__(self) -> "Iterator[pa.Table]":
        """Yield all rows as tables sorted by id, then by rank, then by the order in which they came."""
        self._spill_rows()
        for bucket, size in enumerate(self.sizes):
            if size > BUCKET_BYTES and (self.depth + 1) * DIGITS < 16:
                deeper = Sorter(self.folder / f"bucket-{bucket}", self.schema, self.depth + 1)
                for part in self._parts(bucket):
                    deeper.spill(part)
                yield from deeper
            elif size:
                yield self._sorted(bucket)

    def ranks(self, table: "pa.Table") -> npt.NDArray[np.int64]:
        """Return the ranks of a table's rows."""
        ranks: npt.NDArray[np.int64] = table["came"].to_numpy() >> RANK_BITS
        return ranks

    def spill(self, table: "pa.Table") -> None:
        """Write rows to disk, dealt into buckets by the digits of their ids at this depth."""
        import pyarrow as pa

        start = self.depth * DIGITS
        buckets = np.array([int(name[start : start + DIGITS], 16) for name in table["id"].to_pylist()], dtype=np.int64)
        order = np.argsort(buckets, kind="stable")
        table = table.take(pa.array(order)).combine_chunks()
        ends = np.searchsorted(buckets[order], np.arange(BUCKETS + 1))
        with pa.ipc.new_file(self.folder / f"run-{self._runs}.arrow", self.schema) as run:
            for bucket in range(BUCKETS):
                part = table.slice(ends[bucket], ends[bucket + 1] - ends[bucket])
                run.write_batch(part.to_batches()[0] if part.num_rows else _empty(self.schema))
                self.sizes[bucket] += part.nbytes
        self._runs += 1

    def _spill_rows(self) -> None:
        import pyarrow as pa

        if self._rows:
            self.spill(pa.Table.from_pylist(self._rows, self.schema))
        self._rows, self._waiting = [], 0

    def _parts(self, bucket: int) -> "Iterator[pa.Table]":
        import pyarrow as pa

        for run in range(self._runs):
            # Not mapped: what is mapped counts as this process's memory for as long as there is no want of it.
            with pa.OSFile(str(self.folder / f"run-{run}.arrow")) as file, pa.ipc.open_file(file) as opened:
                yield pa.Table.from_batches([opened.get_batch(bucket)])

    def _sorted(self, bucket: int) -> "pa.Table":
        import pyarrow as pa

        return pa.concat_tables(self._parts(bucket)).sort_by([("id", "ascending"), ("came", "ascending")])


def _empty(schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    return pa.RecordBatch.from_pylist([], schema)
