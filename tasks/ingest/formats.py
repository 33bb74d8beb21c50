"""Readers of file formats, which stream the rows of a file.

`FORMATS` maps the name of a format to its reader. A reader yields (position, row): a position such as "line 3", and a
mapping or an undecoded line of JSON. It raises StageError with the name of the source if the file has another format.
`wanted` are the columns that the file must have.
"""

import csv
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO

from tasks.common.harness.job import StageError
from tasks.ingest import readers

Rows = Iterator[tuple[str, Any]]
PARQUET_BATCH_ROWS = 1000
JSON_BUFFER_BYTES = 2**16
MAX_DEPTH = 100  # of the items of a JSON array
HEAD_BYTES = 4096  # read to detect the format of a file
# First bytes of files that are often mistaken for text: what was found, and what to do.
FILE_SIGNATURES = {
    b"\x1f\x8b": "a gzip file; unpack it first (gunzip)",
    b"PK\x03\x04": "a zip file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first",
    b"PAR1": "a Parquet file; set `format: parquet`",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}


def read_text(name: str, path: Path, wanted: Set[str]) -> Rows:
    """Yield the paragraphs of a text file."""
    paragraphs = readers.split_paragraphs(_read_lines(name, path))
    yield from ((f"paragraph {number}", {"text": paragraph}) for number, paragraph in enumerate(paragraphs, 1))


def read_json_lines(name: str, path: Path, wanted: Set[str]) -> Rows:
    """Yield the lines of a file that are not blank; a line that is not valid JSON is rejected later as a row."""
    filled = ((number, line) for number, line in enumerate(_read_lines(name, path), 1) if line.strip())
    for count, (number, line) in enumerate(filled):
        if not count and line.lstrip().startswith("["):
            raise StageError(
                f"source {name}: expected one JSON object per line in {path}, found a JSON array; write each item on a "
                "line of its own."
            )
        yield f"line {number}", line


def read_csv(name: str, path: Path, wanted: Set[str]) -> Rows:
    """Yield the rows of a CSV file; quoted values may span several lines."""
    reader = csv.DictReader(_read_lines(name, path), skipinitialspace=True)
    try:
        header = readers.strip_header(reader)
        _check_columns(name, path, wanted, set(header))
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise StageError(
            f"source {name}: expected CSV in {path}, found something else (after line {reader.line_num}: {error}); "
            "correct the line."
        ) from error


def read_parquet(name: str, path: Path, wanted: Set[str]) -> Rows:
    """Yield the rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as opened:
            _check_columns(name, path, wanted, set(opened.schema_arrow.names))
            number = 0
            for batch in opened.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"source {name}: expected a Parquet file at {path}, found something else: {error}") from error


def read_objects(name: str, path: Path) -> Rows:
    """Yield the objects of a Parquet file, a JSON array or JSON lines; the first bytes decide which it is."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if path.suffix == ".parquet" or head.startswith(b"PAR1"):
        yield from read_parquet(name, path, set())
    elif head.decode("utf-8-sig", errors="replace").lstrip().startswith("["):
        yield from _read_json_array(name, path)
    else:
        yield from read_json_lines(name, path, set())


def _read_json_array(name: str, path: Path) -> Rows:
    """Yield the items of a file that contains one JSON array; raise StageError for any other content."""
    import ijson

    number = 0
    try:
        with path.open("rb") as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
            for number, item in enumerate(_parse_items(file), 1):
                yield f"item {number}", item
    except (ijson.JSONError, ValueError) as error:
        for _ in _read_lines(name, path):
            pass  # raises StageError with the line if the file is not UTF-8
        raise StageError(
            f"source {name}: expected one JSON array in {path}, found something else after item {number}: {error}; "
            "correct it there, or write each object on a line of its own."
        ) from error


def _parse_items(file: BinaryIO) -> Iterator[Any]:
    """Yield the items of a JSON array one by one, reading the file in pieces.

    Uses ijson's Python backend: the C backends read a lone surrogate (`\\ud800`) as a question mark, where the row must
    be rejected, and reject integers of more than 64 bits. Does not use `ijson.items`: it keeps a prefix for every level
    of an item, and 100 kB of opening brackets took more memory than the machine had.
    """
    from ijson.backends import python as backend
    from ijson.common import ObjectBuilder

    events, depth = backend.basic_parse(file, buf_size=JSON_BUFFER_BYTES, use_float=True), 0
    next(events)  # the opening bracket of the array
    for event, value in events:
        is_end = event in ("end_map", "end_array")
        if not depth:
            if is_end:  # of the array; the parser raises an error for anything after it
                continue
            builder = ObjectBuilder()
        builder.event(event, value)
        depth += (event in ("start_map", "start_array")) - is_end
        if depth > MAX_DEPTH:
            raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
        if not depth:
            yield builder.value


def _read_lines(name: str, path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their line ends; Unicode line separators (U+2028) do not end a line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise StageError(f"source {name}: {_describe_encoding_error(path, error)}") from error


def _describe_encoding_error(path: Path, error: UnicodeDecodeError) -> str:
    """Return what a file is that is not UTF-8, or the first invalid line (the decoder reads ahead of the last one)."""
    number = 0
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        for number, line in enumerate(file, 1):  # noqa: B007 - used after the loop
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    found = f"the byte 0x{error.object[error.start]:02x} in line {number}; save the file as UTF-8"
    found = next((kind for signature, kind in FILE_SIGNATURES.items() if head.startswith(signature)), found)
    return f"expected UTF-8 text in {path}, found {found}."


def _check_columns(name: str, path: Path, wanted: Set[str], found: Set[str]) -> None:
    if wanted - found:
        expected, got, missing = (", ".join(sorted(names)) or "none" for names in (wanted, found, wanted - found))
        raise StageError(f"source {name}: {path} lacks columns. Expected {expected}; found {got}. Missing: {missing}.")


FORMATS: dict[str, Callable[[str, Path, Set[str]], Rows]] = {
    "txt": read_text,
    "jsonl": read_json_lines,
    "csv": read_csv,
    "parquet": read_parquet,
}
