"""External sorting: sorts more rows than fit into memory by id, so that rows with equal ids are adjacent.

An id is a hash in hex, so its first two digits distribute rows evenly over 256 buckets. Buffered rows are spilled to
disk in runs, each with one batch for every bucket. Then the buckets are read one by one and sorted in memory. A bucket
that is too large is distributed again by the next two digits.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tasks.common import tables

if TYPE_CHECKING:
    import pyarrow as pa

SPILL_BYTES = 2**24  # buffered in memory before rows are spilled
BUCKET_BYTES = 2**26  # largest bucket that is sorted in memory
RANK_SHIFT = 56  # bits of the row number in the column `order`, below the rank
DIGITS_PER_LEVEL = 2
BUCKETS = 16**DIGITS_PER_LEVEL


class Sorter:
    """Collects rows of one schema with a column `id` of 16 hex digits, and iterates over them in order."""

    def __init__(self, folder: Path, schema: "pa.Schema", depth: int = 0) -> None:
        import pyarrow as pa

        folder.mkdir(parents=True)
        self.folder, self.depth = folder, depth
        self.schema = schema if "order" in schema.names else schema.append(pa.field("order", pa.int64()))
        self.bucket_bytes = np.zeros(BUCKETS, dtype=np.int64)
        self._rows: list[dict[str, Any]] = []
        self._waiting_bytes, self._rows_added, self._runs = 0, 0, 0

    def add(self, row: Mapping[str, Any], size: int, rank: int = 0) -> None:
        """Add one row of about `size` bytes; among equal ids, rows of a lower rank come first."""
        self._rows.append({**row, "order": rank << RANK_SHIFT | self._rows_added})
        self._rows_added += 1
        self._waiting_bytes += size
        if self._waiting_bytes > SPILL_BYTES:
            self._spill_rows()

    def __iter__(self) -> "Iterator[pa.Table]":
        """Yield all rows as tables sorted by id, then by rank, then in the order of `add`."""
        self._spill_rows()
        for bucket, size in enumerate(self.bucket_bytes):
            if size > BUCKET_BYTES and (self.depth + 1) * DIGITS_PER_LEVEL < 16:
                deeper = Sorter(self.folder / f"bucket-{bucket}", self.schema, self.depth + 1)
                for part in self._read_bucket(bucket):
                    deeper.spill(part)
                yield from deeper
            elif size:
                yield self._sort_bucket(bucket)

    def ranks(self, table: "pa.Table") -> npt.NDArray[np.int64]:
        """Return the ranks of the rows of a table, shape (rows,)."""
        ranks: npt.NDArray[np.int64] = table["order"].to_numpy() >> RANK_SHIFT
        return ranks

    def spill(self, table: "pa.Table") -> None:
        """Write rows to disk, distributed over buckets by the digits of their ids at this depth."""
        import pyarrow as pa

        start = self.depth * DIGITS_PER_LEVEL
        buckets = np.array(
            [int(name[start : start + DIGITS_PER_LEVEL], 16) for name in table["id"].to_pylist()], dtype=np.int64
        )
        order = np.argsort(buckets, kind="stable")
        table = table.take(pa.array(order)).combine_chunks()
        ends = np.searchsorted(buckets[order], np.arange(BUCKETS + 1))
        with pa.ipc.new_file(self.folder / f"run-{self._runs}.arrow", self.schema) as run:
            for bucket in range(BUCKETS):
                part = table.slice(ends[bucket], ends[bucket + 1] - ends[bucket])
                run.write_batch(part.to_batches()[0] if part.num_rows else _empty_batch(self.schema))
                self.bucket_bytes[bucket] += part.nbytes
        self._runs += 1

    def _spill_rows(self) -> None:
        import pyarrow as pa

        if self._rows:
            self.spill(pa.Table.from_pylist(self._rows, self.schema))
        self._rows, self._waiting_bytes = [], 0

    def _read_bucket(self, bucket: int) -> "Iterator[pa.Table]":
        import pyarrow as pa

        for run in range(self._runs):
            # Not memory-mapped: mapped pages count as memory of this process until the kernel reclaims them.
            with pa.OSFile(str(self.folder / f"run-{run}.arrow")) as file, pa.ipc.open_file(file) as opened:
                yield pa.Table.from_batches([opened.get_batch(bucket)])

    def _sort_bucket(self, bucket: int) -> "pa.Table":
        import pyarrow as pa

        return pa.concat_tables(self._read_bucket(bucket)).sort_by([("id", "ascending"), ("order", "ascending")])


def write_distinct(
    sorter: Sorter, path: Path, schema: "pa.Schema", rejected_rank: int, reject: "Callable[[pa.Table], None]",
    finish: "Callable[[pa.Table], pa.Table]",
) -> Counter[tuple[str, str]]:  # fmt: skip
    """Write the first row of each id, completed by `finish`, and count the rows by (source, split).

    Later rows of an id are duplicates; `reject` receives those of `rejected_rank`.
    """
    import pyarrow as pa

    counts: Counter[tuple[str, str]] = Counter()
    with tables.Writer(path, schema) as writer:
        for rows in sorter:
            ids = rows["id"].to_numpy()
            is_duplicate = np.concatenate([[False], ids[1:] == ids[:-1]])
            reject(rows.filter(pa.array(is_duplicate & (sorter.ranks(rows) == rejected_rank))))
            kept = finish(rows.filter(pa.array(~is_duplicate)).select(schema.names))
            counts.update(zip(kept["source"].to_pylist(), kept["split"].to_pylist(), strict=True))
            writer.write(kept)
    return counts


def _empty_batch(schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    return pa.RecordBatch.from_pylist([], schema)
