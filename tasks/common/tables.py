"""Tables on disk: a folder of Parquet shards per table; equal rows give equal bytes.

A table is written in batches (`Writer`) and can be read in batches, so it need not fit into memory. The boundaries of
shards and row groups depend only on the number of rows, not on the batches in which they were written.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_PER_SHARD = 250_000
ROWS_PER_GROUP = 2_500  # rows that a writer buffers and a reader decodes at once; a divisor of ROWS_PER_SHARD
TABLES = ("corpus", "instructions", "rankings")

SourceNames = Annotated[
    list[str] | None,
    Field(description="Sources whose conversations are used, by name; null: all of them", min_length=1),
]


def schema(table: str) -> "pa.Schema":
    """Return the Arrow schema of `corpus`, `instructions` or `rankings`."""
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    text, texts, numbers = pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())
    fields = {
        "corpus": {
            "id": text, "text": text, "names": texts, "source": text, "group": text, "licence": text, "split": text,
        },
        "instructions": {
            "id": text, "messages": messages, "entity": text, "answer": text, "tone": text, "source": text,
            "split": text,
        },
        "rankings": {
            "id": text, "prompt": messages, "responses": texts, "ranks": pa.list_(pa.int32()),
            "scores": pa.list_(numbers), "scale": numbers, "annotators": pa.int32(), "annotator": text,
            "models": texts, "source": text, "split": text,
        },
    }  # fmt: skip
    return pa.schema(list(fields[table].items()))


class Writer:
    """Writes a table's shards `part-00000.parquet` … in batches; an empty table has one shard."""

    def __init__(self, path: Path, table_schema: "pa.Schema") -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.schema, self.rows = path, table_schema, 0
        self._buffer: list[pa.Table] = []
        self._buffered_rows, self._shard_rows, self._shards = 0, 0, 0
        self._shard_writer: pq.ParquetWriter | None = None

    def write(self, rows: "Iterable[Mapping[str, Any]] | pa.Table") -> None:
        """Append rows; complete row groups are written, the rest is buffered."""
        import pyarrow as pa

        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), self.schema)
        self._buffer.append(table.cast(self.schema))
        self.rows, self._buffered_rows = self.rows + table.num_rows, self._buffered_rows + table.num_rows
        if self._buffered_rows >= ROWS_PER_GROUP:
            self._flush(self._buffered_rows // ROWS_PER_GROUP * ROWS_PER_GROUP)

    def close(self) -> None:
        """Write the buffered rows and complete the table."""
        if self._buffered_rows or not self.rows:
            self._flush(self._buffered_rows)
        self._close_shard()

    def _flush(self, count: int) -> None:
        import pyarrow as pa

        buffered = pa.concat_tables(self._buffer) if self._buffer else self.schema.empty_table()
        for start in range(0, max(count, 1), ROWS_PER_GROUP):
            group = buffered.slice(start, min(ROWS_PER_GROUP, count - start))
            # Parquet pages follow Arrow chunks: without combining, the bytes would depend on the batches.
            self._open_shard().write_table(group.combine_chunks())
            self._shard_rows += group.num_rows
        self._buffer, self._buffered_rows = [buffered.slice(count).combine_chunks()], self._buffered_rows - count

    def _open_shard(self) -> "pq.ParquetWriter":
        import pyarrow.parquet as pq

        if self._shard_writer is None or self._shard_rows == ROWS_PER_SHARD:
            self._close_shard()
            path = self.path / f"part-{self._shards:05d}.parquet"
            self._shard_writer = pq.ParquetWriter(path, self.schema, compression="zstd", use_dictionary=True)
            self._shards, self._shard_rows = self._shards + 1, 0
        return self._shard_writer

    def _close_shard(self) -> None:
        if self._shard_writer is not None:
            self._shard_writer.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the table or, after an error, only close its file."""
        if error is None:
            self.close()
        else:
            self._close_shard()


def write(rows: "Iterable[Mapping[str, Any]] | pa.Table", path: Path, table_schema: "pa.Schema") -> int:
    """Write a whole table and return its number of rows."""
    with Writer(path, table_schema) as writer:
        writer.write(rows)
    return writer.rows


def read(path: Path, split: str | None = None, sources: Sequence[str] | None = None) -> "pa.Table":
    """Read a table's shards in order; with `split` or `sources`, only the rows of that split, of these sources."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pa.concat_tables([pq.read_table(shard) for shard in _shards(path)])
    table = table if split is None else filter_split(table, split)
    return table if sources is None else table.filter(pc.is_in(table["source"], pa.array(sources, pa.string())))


def batches(path: Path, split: str | None = None, columns: Sequence[str] | None = None) -> "Iterator[pa.Table]":
    """Yield a table's rows in order, one row group at a time; optionally only the rows of a split, only some columns.

    With `split`, `columns` must contain "split".
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in _shards(path):
        with pq.ParquetFile(shard, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns):
                table = pa.Table.from_batches([batch])
                yield table if split is None else filter_split(table, split)


def schema_of(path: Path) -> "pa.Schema":
    """Return the schema that a table was written with."""
    import pyarrow.parquet as pq

    return pq.read_schema(_shards(path)[0])


def rows_at(path: Path, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Return a table's rows at ascending positions; only one row group is in memory at a time."""
    found: list[dict[str, Any]] = []
    start = 0
    for rows in batches(path):
        inside = [position - start for position in positions if start <= position < start + rows.num_rows]
        found += rows.take(inside).to_pylist() if inside else []
        start += rows.num_rows
        if len(found) == len(positions):
            break
    return found


def count(path: Path) -> int:
    """Return a table's number of rows, from its shards' footers."""
    import pyarrow.parquet as pq

    return sum(int(pq.read_metadata(shard).num_rows) for shard in _shards(path))


def _shards(path: Path) -> list[Path]:
    shards = sorted(path.glob("*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{path} holds no Parquet shards")
    return shards


def filter_split(table: "pa.Table", split: str) -> "pa.Table":
    """Return the rows of one split."""
    import pyarrow.compute as pc

    return table.filter(pc.equal(table["split"], split))
