"""JSON: lines, and values of any nesting one after another (arrays, objects, pretty-printed or not).

A file of lines has one row in each line, so a bad line is a bad row. In any other file the items of an array are rows;
what follows an array or an object is read too, and an error stops the reading with its place, because nothing says
where the next row begins. An object whose only list of objects is not a column of a row is a wrapper around rows, such
as `{"version": 1, "data": [...]}`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Set
from typing import IO, Any

import orjson

from tasks.ingest import columns
from tasks.ingest.source_files import Rows, SourceFile, UnreadableFile

BUFFER_CHARACTERS = 2**18
MAX_VALUE_CHARACTERS = 2**28  # of an item of an array, or of a wrapper with its rows
TRUNCATION_CHARACTERS = 16  # an error this near to the end of the buffer may be a value that goes on after it
WHITESPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def decode(row: bytes) -> Any:
    """Return the value of a line; raise ValueError with the reason if it is not valid JSON."""
    try:
        return orjson.loads(row)
    except orjson.JSONDecodeError:  # it also refuses NaN, half characters and deep nesting
        text = row.decode()
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def read_lines(file: SourceFile, records: str | None) -> Rows:
    """Yield the lines that are not blank, as undecoded bytes; with `records`, the items of that list in each."""
    filled = ((number, line) for number, line in enumerate(_iter_lines(file), 1) if line.strip())
    if records is None:
        yield from ((f"line {number}", line) for number, line in filled)
        return
    for number, line in filled:
        try:
            items = _unwrap(decode(line), records, frozenset(), f"line {number}")
        except ValueError:  # the row is rejected when it is decoded again
            items = iter([line])
        yield from ((f"line {number}, item {item}", row) for item, row in enumerate(items, 1))


def _iter_lines(file: SourceFile) -> Iterator[bytes]:
    """Yield lines in UTF-8; those of text in an unknown encoding as they are, because only some may be damaged."""
    if file.find_encoding() in ("utf-8-sig", None):
        with file.open() as opened:
            for number, line in enumerate(opened):
                yield line if number else line.removeprefix(b"\xef\xbb\xbf")
    else:
        with file.open_text(newline="\n") as text:
            yield from (line.encode("utf-8", "surrogatepass") for line in text)


def read_values(file: SourceFile, records: str | None, row_keys: Set[str]) -> Rows:
    """Yield the rows of a file of JSON values; an object with one of `row_keys` is a row, no wrapper around rows.

    Raise UnreadableFile with the place for content that is not JSON.
    """
    number = 0
    with file.open_text() as opened:
        scanner = _Scanner(opened)
        try:
            for value, is_item in _top_level_values(scanner):
                place = f"line {scanner.line}"
                for row in [value] if is_item and records is None else _unwrap(value, records, row_keys, place):
                    number += 1
                    yield f"item {number}", row
        except (json.JSONDecodeError, RecursionError) as error:
            raise UnreadableFile(
                f"expected JSON in {file.label}, found something else after item {number}, in line "
                f"{scanner.line_of(error)}: {scanner.describe(error)}; correct it there"
            ) from error
        except ValueError as error:
            raise UnreadableFile(f"{file.label}: {error}") from error


def _top_level_values(scanner: "_Scanner") -> Iterator[tuple[Any, bool]]:
    """Yield the items of arrays and all other values, in the order of the file, and whether each is an item."""
    while first := scanner.peek():
        if first != "[":
            yield scanner.value(), False
            continue
        scanner.take("[")
        if scanner.peek() == "]":
            scanner.take("]")
            continue
        while True:
            yield scanner.value(), True
            if scanner.peek() == "]":
                scanner.take("]")
                break
            scanner.take(",")


def _unwrap(value: Any, records: str | None, row_keys: Set[str], place: str) -> Iterator[Any]:
    """Yield the rows in a value: those of the list that `records` names, those in a wrapper, or the value itself."""
    if records is not None:
        found = columns.lookup(value, records)
        if not isinstance(found, list):
            raise ValueError(f"{place}: expected the list `records: {records}` names, found {type(found).__name__}")
        yield from found
        return
    if not isinstance(value, Mapping) or not row_keys.isdisjoint(value):
        yield value
        return
    lists = [key for key, items in value.items() if isinstance(items, list) and items and isinstance(items[0], Mapping)]
    if len(lists) > 1:
        raise ValueError(f"{place}: the lists {', '.join(lists)} may be the rows; name one of them with `records`")
    yield from value[lists[0]] if lists else [value]


class _Scanner:
    """Decodes JSON values one by one from text that is read in pieces."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._buffer, self._at, self._ended = stream, "", 0, False
        self.line = 1

    def peek(self) -> str:
        """Return the next character that is not white space, or an empty text at the end."""
        while True:
            match = WHITESPACE.match(self._buffer, self._at)
            self._move(match.end() if match else self._at)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._fill()

    def take(self, character: str) -> None:
        """Skip the next character, which must be this one."""
        if self.peek() != character:
            raise json.JSONDecodeError(f"Expecting {character!r}", self._buffer, self._at)
        self._at += 1

    def value(self) -> Any:
        """Return the next value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    raise
            else:
                if end < len(self._buffer) or self._ended:  # else a number may go on
                    self._move(end)
                    return value
            self._fill()

    def line_of(self, error: BaseException) -> int:
        """Return the line of an error."""
        if not isinstance(error, json.JSONDecodeError):
            return self.line
        return self.line + self._buffer.count("\n", self._at, error.pos)

    def describe(self, error: json.JSONDecodeError | RecursionError) -> str:
        """Return the reason of an error."""
        if isinstance(error, RecursionError):
            return "its values are nested too deep"
        is_truncated = self._ended and (error.msg.startswith("Unterminated") or error.pos >= len(self._buffer))
        return "the file ends within a value" if is_truncated else error.msg

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        if len(self._buffer) - self._at > MAX_VALUE_CHARACTERS:
            return False
        return error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - TRUNCATION_CHARACTERS

    def _move(self, end: int) -> None:
        self.line += self._buffer.count("\n", self._at, end)
        self._at = end

    def _fill(self) -> None:
        """Read on; the buffer doubles while a value does not fit, so that the work is proportional to its length."""
        rest = self._buffer[self._at :]
        more = self._stream.read(max(BUFFER_CHARACTERS, len(rest)))
        self._buffer, self._at, self._ended = rest + more, 0, not more
