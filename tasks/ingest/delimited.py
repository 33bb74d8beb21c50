"""CSV and TSV, as Excel and other programs write them: the delimiter is found in the header, cells may be long."""

import csv
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from tasks.ingest.source_files import Rows, SourceFile, UnreadableFile

DELIMITERS = (",", ";", "\t", "|")
MAX_CELL_CHARACTERS = 2**24
MAX_HEADER_LINES = 100
PROBLEM = None  # the key of the reason why a row cannot be used; no column is called so


def read(file: SourceFile) -> Rows:
    """Yield the rows of a CSV or TSV file; quoted cells may span several lines."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)  # of the process; its default, 131,072, is less than a long document
    with file.open_text(newline="") as opened:
        head, delimiter, skipped = _find_delimiter(opened)
        lines = _Lines(chain(head, opened))
        reader, last_line = csv.reader(lines, delimiter=delimiter, skipinitialspace=True), 0
        try:
            header: list[str] = []
            for cells in reader:
                if lines.ended:  # the reader asked for more lines within this row
                    raise csv.Error("a quoted cell that begins there is never closed")
                last_line = reader.line_num + skipped
                if not header:
                    header = _parse_header(file, cells)
                elif cells:
                    yield f"line {last_line}", _make_row(header, cells, lines.last)
        except csv.Error as error:
            raise UnreadableFile(
                f"expected CSV in {file.label}, found something else after line {last_line}: {error}; correct the row "
                "there"
            ) from error


def _make_row(header: list[str], cells: list[str], last_line: str) -> dict[Any, Any]:
    """Return a row; one with another number of cells than columns, or without an end, has the reason as PROBLEM."""
    row: dict[Any, Any] = dict(zip(header, cells, strict=False))
    if len(cells) > len(header):
        extra = cells[len(header) :]
        row[PROBLEM] = f"more cells than columns, {extra} too many; a value with the delimiter needs quotes around it"
    elif len(cells) < len(header) and not last_line.endswith(("\n", "\r")):
        row[PROBLEM] = f"the file ends within this row, which has {len(cells)} of {len(header)} cells"
    return row


class _Lines:
    """The lines of a file. `last` is the last one; `ended` says that one more was asked for than there are."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self.last, self.ended = lines, "", False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.last = line
        return line


def _find_delimiter(lines: Iterable[str]) -> tuple[list[str], str, int]:
    """Return the lines of the header, the delimiter and how many lines were skipped.

    The delimiter is that of Excel's first line `sep=;`, or the most frequent one outside quotes in the header.
    """
    head: list[str] = []
    for line in lines:
        if not head and line.lower().startswith("sep=") and len(line.strip("\r\n")) == len("sep=,"):
            return [], line[len("sep=")], 1
        head.append(line)
        if (line.strip() and "".join(head).count('"') % 2 == 0) or len(head) == MAX_HEADER_LINES:
            break
    outside = "".join("".join(head).split('"')[::2])
    return head, max(DELIMITERS, key=outside.count), 0


def _parse_header(file: SourceFile, cells: list[str]) -> list[str]:
    """Return the names of the columns; raise UnreadableFile for a name that is there twice: one would be lost."""
    header = [name.strip() for name in cells]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UnreadableFile(
            f"{file.label}: expected one column of each name in line 1, found {', '.join(map(repr, twice))} more than "
            "once; rename one of them"
        )
    return header
