"""Parquet and Arrow (Feather, IPC file or stream), read in batches."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tasks.ingest.source_files import PACKED_SIGNATURES, Rows, SourceFile, UnreadableFile

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000


def read_parquet(file: SourceFile) -> Rows:
    """Yield the rows of a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(_stream(file, "Parquet"), pre_buffer=False) as opened:
        yield from _rows(opened.iter_batches(batch_size=BATCH_ROWS))


def read_arrow(file: SourceFile) -> Rows:
    """Yield the rows of an Arrow file or stream."""
    import pyarrow as pa

    stream = _stream(file, "Arrow")
    if file.head().startswith(b"ARROW1"):
        with pa.ipc.open_file(stream) as opened:
            yield from _rows(opened.get_batch(number) for number in range(opened.num_record_batches))
    else:
        with pa.ipc.open_stream(stream) as opened:
            yield from _rows(iter(opened))


def _stream(file: SourceFile, kind: str) -> Any:
    """Return the file for Arrow, which seeks in it."""
    import pyarrow as pa

    if file.content is not None:
        content = file.content
    else:
        with file.path.open("rb") as opened:
            content = opened.read(4)
    if content.startswith(tuple(PACKED_SIGNATURES)):
        raise UnreadableFile(f"{file.label}: {kind} packed once more; unpack it, because it is compressed already")
    return pa.BufferReader(content) if file.content is not None else pa.OSFile(str(file.path))


def _rows(batches: "Iterator[pa.RecordBatch]") -> Rows:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield f"row {number}", row
