"""Tables on disk: a folder of Parquet shards per table, written so that the same rows give the same bytes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_SHARD = 250_000
TABLES = ("corpus", "instructions", "rankings")


def schema(table: str) -> "pa.Schema":
    """Return the Arrow schema of `corpus`, `instructions` or `rankings`."""
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    text, texts, numbers = pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())
    fields = {
        "corpus": {"id": text, "text": text, "names": texts, "source": text, "licence": text, "split": text},
        "instructions": {
            "id": text, "messages": messages, "entity": text, "answer": text, "tone": text, "source": text,
            "split": text,
        },
        "rankings": {
            "id": text, "prompt": messages, "responses": texts, "ranks": pa.list_(pa.int32()),
            "scores": pa.list_(numbers), "scale": numbers, "annotators": pa.int32(), "models": texts, "source": text,
            "split": text,
        },
    }  # fmt: skip
    return pa.schema(list(fields[table].items()))


def write(rows: "Iterable[Mapping[str, Any]] | pa.Table", path: Path, table_schema: "pa.Schema") -> int:
    """Write rows as shards `part-00000.parquet` … into a folder and return their number (one shard even for none)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = rows.cast(table_schema) if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), table_schema)
    path.mkdir(parents=True, exist_ok=True)
    for index, start in enumerate(range(0, max(table.num_rows, 1), ROWS_PER_SHARD)):
        shard = table.slice(start, ROWS_PER_SHARD)
        pq.write_table(shard, path / f"part-{index:05d}.parquet", compression="zstd", use_dictionary=True)
    return int(table.num_rows)


def read(path: Path, split: str | None = None) -> "pa.Table":
    """Read a table's shards in order; with `split`, only the rows of that split."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    shards = sorted(path.glob("*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{path} holds no Parquet shards")
    table = pa.concat_tables([pq.read_table(shard) for shard in shards])
    return table if split is None else table.filter(pc.equal(table["split"], split))
