"""Formats of files: how the rows of one are read, one after the other, without the file being held in memory.

`FORMATS` maps a format's name to the function that reads it. Each yields (place, row): where the row stands ("line 3")
and a mapping or a line of JSON that is still to be decoded; each raises StageError with the source's name where the
file is of another kind.
"""

import csv
import json
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

from tasks.common.sources import readers
from tasks.common.stage import StageError

Rows = Iterator[tuple[str, Any]]
ROWS_AT_ONCE = 1000  # of a Parquet file
CHARACTERS_AT_ONCE = 2**16  # of a JSON array
HEAD_BYTES = 4096  # that tell what a file is
# How files begin that are often taken for text, and what to do with them.
OTHERS = {
    b"\x1f\x8b": "a gzip file; unpack it first (gunzip)",
    b"PK\x03\x04": "a zip file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first",
    b"PAR1": "a Parquet file; set `format: parquet`",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}


def text(name: str, path: Path, wanted: Set[str]) -> Rows:
    """Yield the paragraphs of a text file."""
    paragraphs = readers.paragraphs(_lines(name, path))
    yield from ((f"paragraph {number}", {"text": paragraph}) for number, paragraph in enumerate(paragraphs, 1))


def json_lines(name: str, path: Path, wanted: Set[str]) -> Rows:
    """Yield the lines of a file that hold something; a line that is no JSON is a bad row, not a bad file."""
    filled = ((number, line) for number, line in enumerate(_lines(name, path), 1) if line.strip())
    for count, (number, line) in enumerate(filled):
        if not count and line.lstrip().startswith("["):
            raise StageError(
                f"source {name}: expected an object a line in {path}, found a JSON array; write each of its items on a "
                "line of its own."
            )
        yield f"line {number}", line


def comma_separated(name: str, path: Path, wanted: Set[str]) -> Rows:
    """Yield the rows of a CSV file; a quoted value may go on over several lines."""
    reader = csv.DictReader(_lines(name, path), skipinitialspace=True)
    try:
        header = readers.header(reader)
        _columns(name, path, wanted, set(header))
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise StageError(
            f"source {name}: expected CSV in {path}, found something else (after line {reader.line_num}: {error}); "
            "mend the line."
        ) from error


def parquet(name: str, path: Path, wanted: Set[str]) -> Rows:
    """Yield the rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as opened:
            _columns(name, path, wanted, set(opened.schema_arrow.names))
            number = 0
            for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"source {name}: expected a Parquet file at {path}, found something else: {error}") from error


def objects(name: str, path: Path) -> Rows:
    """Yield the objects of a file that is Parquet, a JSON array or JSON lines, told apart by how it begins."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if path.suffix == ".parquet" or head.startswith(b"PAR1"):
        yield from parquet(name, path, set())
    elif head.decode("utf-8-sig", errors="replace").lstrip().startswith("["):
        yield from _array(name, path)
    else:
        yield from json_lines(name, path, set())


def _array(name: str, path: Path) -> Rows:
    """Yield the items of a JSON array one by one, with their numbers and lines; only a piece of the text is held."""
    line, number = 1, 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            head, _, held = file.read(CHARACTERS_AT_ONCE).partition("[")
            line += head.count("\n")
            while True:
                start = len(held) - len(held.lstrip(", \t\r\n"))
                line, held = line + held.count("\n", 0, start), held[start:]
                if held.startswith("]"):
                    return
                row, end, told = _first_item(held)
                if end < len(held):  # what goes to the very end may go on in the next piece
                    number += 1
                    yield f"item {number} (line {line})", row
                    line, held = line + held.count("\n", 0, end), held[end:]
                elif piece := file.read(max(CHARACTERS_AT_ONCE, len(held))):
                    held += piece
                else:
                    told = f"expected a JSON array in {path}, found something else from line {line} on ({told})."
                    raise StageError(f"source {name}: {told}")
    except UnicodeDecodeError as error:
        raise StageError(f"source {name}: {_not_text(path, error)}") from error


def _first_item(held: str) -> tuple[Any, int, str]:
    """Return the JSON item at the head of a text and where it ends, or the whole text's length and what is wrong."""
    try:
        return *json.JSONDecoder().raw_decode(held), "it ends too early"
    except (ValueError, RecursionError) as error:
        return None, len(held), str(error)


def _lines(name: str, path: Path) -> Iterator[str]:
    """Yield the lines of a text file, their ends included; other signs that end a line (U+2028) do not cut it."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise StageError(f"source {name}: {_not_text(path, error)}") from error


def _not_text(path: Path, error: UnicodeDecodeError) -> str:
    """Say what a file that is no UTF-8 is instead, or where; text is read far ahead of the line that was last taken."""
    number = 0
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        for number, line in enumerate(file, 1):  # noqa: B007 - told below
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    found = f"the byte 0x{error.object[error.start]:02x} in line {number}; save the file as UTF-8"
    found = next((told for start, told in OTHERS.items() if head.startswith(start)), found)
    return f"expected UTF-8 text in {path}, found {found}."


def _columns(name: str, path: Path, wanted: Set[str], found: Set[str]) -> None:
    if wanted - found:
        expected, got, missing = (", ".join(sorted(names)) or "none" for names in (wanted, found, wanted - found))
        raise StageError(
            f"source {name}: {path} does not have the columns that are read. Expected {expected}; found {got}. "
            f"Missing: {missing}."
        )


FORMATS: dict[str, Callable[[str, Path, Set[str]], Rows]] = {
    "txt": text,
    "jsonl": json_lines,
    "csv": comma_separated,
    "parquet": parquet,
}
