"""Tables on disk: a folder of Parquet shards per table, written so that the same rows give the same bytes.

A table is written while its rows come (`Writer`) and can be read in batches, so that none has to fit into memory. The
cuts into shards and row groups depend on the number of rows alone, never on how they were handed over.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_PER_SHARD = 250_000
ROWS_PER_GROUP = 2_500  # what a writer keeps back and a reader decodes at once; a divisor of a shard's rows
TABLES = ("corpus", "instructions", "rankings")


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
    """Writes a table's shards `part-00000.parquet` … into a folder as the rows come; one shard even for no rows."""

    def __init__(self, path: Path, table_schema: "pa.Schema") -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.schema, self.rows = path, table_schema, 0
        self._held: list[pa.Table] = []
        self._waiting, self._written, self._shards = 0, 0, 0
        self._open: pq.ParquetWriter | None = None

    def write(self, rows: "Iterable[Mapping[str, Any]] | pa.Table") -> None:
        """Add rows; whole row groups go to disk, the rest waits for more."""
        import pyarrow as pa

        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), self.schema)
        self._held.append(table.cast(self.schema))
        self.rows, self._waiting = self.rows + table.num_rows, self._waiting + table.num_rows
        if self._waiting >= ROWS_PER_GROUP:
            self._flush(self._waiting // ROWS_PER_GROUP * ROWS_PER_GROUP)

    def close(self) -> None:
        """Write what waits; only then is the table complete."""
        if self._waiting or not self.rows:
            self._flush(self._waiting)
        self._end_shard()

    def _flush(self, count: int) -> None:
        import pyarrow as pa

        held = pa.concat_tables(self._held) if self._held else self.schema.empty_table()
        for start in range(0, max(count, 1), ROWS_PER_GROUP):
            group = held.slice(start, min(ROWS_PER_GROUP, count - start))
            # Pages are cut along chunks: joined, they no longer tell in which portions the rows came.
            self._shard().write_table(group.combine_chunks())
            self._written += group.num_rows
        self._held, self._waiting = [held.slice(count).combine_chunks()], self._waiting - count

    def _shard(self) -> "pq.ParquetWriter":
        import pyarrow.parquet as pq

        if self._open is None or self._written == ROWS_PER_SHARD:
            self._end_shard()
            name = f"part-{self._shards:05d}.parquet"
            self._open = pq.ParquetWriter(self.path / name, self.schema, compression="zstd", use_dictionary=True)
            self._shards, self._written = self._shards + 1, 0
        return self._open

    def _end_shard(self) -> None:
        if self._open is not None:
            self._open.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the table, or after an error let go of its file."""
        if error is None:
            self.close()
        else:
            self._end_shard()


def write(rows: "Iterable[Mapping[str, Any]] | pa.Table", path: Path, table_schema: "pa.Schema") -> int:
    """Write a whole table and return the number of its rows."""
    with Writer(path, table_schema) as writer:
        writer.write(rows)
    return writer.rows


def read(path: Path, split: str | None = None) -> "pa.Table":
    """Read a table's shards in order; with `split`, only the rows of that split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([pq.read_table(shard) for shard in _shards(path)])
    return table if split is None else only(table, split)


def batches(path: Path, split: str | None = None, columns: Sequence[str] | None = None) -> "Iterator[pa.Table]":
    """Yield a table's rows in order, a row group at a time; with `split`, only its rows; `columns` as they are asked.

    With `split`, the column of that name must be among the columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in _shards(path):
        with pq.ParquetFile(shard, pre_buffer=False) as opened:
            for batch in opened.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns):
                table = pa.Table.from_batches([batch])
                yield table if split is None else only(table, split)


def schema_of(path: Path) -> "pa.Schema":
    """Return the schema that a table was written with."""
    import pyarrow.parquet as pq

    return pq.read_schema(_shards(path)[0])


def rows_at(path: Path, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows at rising positions of a table; only a row group of it is held at once."""
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
    """Return the number of a table's rows, from its shards' footers."""
    import pyarrow.parquet as pq

    return sum(int(pq.read_metadata(shard).num_rows) for shard in _shards(path))


def _shards(path: Path) -> list[Path]:
    shards = sorted(path.glob("*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{path} holds no Parquet shards")
    return shards


def only(table: "pa.Table", split: str) -> "pa.Table":
    """Return the rows of one split."""
    import pyarrow.compute as pc

    return table.filter(pc.equal(table["split"], split))
