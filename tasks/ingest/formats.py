"""File formats: which one a file has, by its first bytes and its suffix, and the reader of each.

A reader yields (position, row): a position such as "line 3", and a mapping or an undecoded line of JSON. It raises
UnreadableFile with the place if the file is of another format, damaged or truncated.
"""

import json
import re
from collections.abc import Callable, Set
from typing import Any

from tasks.ingest import columnar, delimited, documents, json_values
from tasks.ingest.source_files import PACKED_SIGNATURES, READ_ERRORS, Rows, SourceFile, UnreadableFile

DOCUMENT_FORMATS = ("txt", "md", "html", "pdf")
TABULAR_FORMATS = ("csv", "parquet", "arrow")  # all rows have the columns of the first
FILE_FORMATS = (*DOCUMENT_FORMATS, "json", "jsonl", *TABULAR_FORMATS)
SUFFIXES = {
    ".txt": "txt", ".text": "txt", ".md": "md", ".markdown": "md", ".html": "html", ".htm": "html", ".xhtml": "html",
    ".pdf": "pdf", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".tab": "csv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
SIGNATURES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"%PDF-": "pdf"}
# First bytes of files that are no source of text: what was found, and what to do.
OTHER_SIGNATURES = {
    b"PK\x03\x04": "a zip file or a document of Word, Excel or PowerPoint; unpack it, or save it as text, CSV or PDF",
    b"SQLite format 3": "an SQLite database; read it with a source of `kind: sql`",
    b"\xd0\xcf\x11\xe0": "an old document of Word or Excel; save it as text, CSV or PDF",
    b"{\\rtf": "an RTF document; save it as text or PDF",
    b"FEA1": "Feather version 1; save it as Parquet",
    b"\x80\x02": "a pickle, which can run code; save it as Parquet or JSON lines",
    b"\x80\x03": "a pickle, which can run code; save it as Parquet or JSON lines",
    b"\x80\x04": "a pickle, which can run code; save it as Parquet or JSON lines",
    b"\x80\x05": "a pickle, which can run code; save it as Parquet or JSON lines",
    b"BZh": "a bzip2 file; unpack it, or pack it with gzip or zstd",
    b"\xfd7zXZ": "an xz file; unpack it, or pack it with gzip or zstd",
    b"7z\xbc\xaf": "a 7z file; unpack it",
    b"Rar!": "a rar file; unpack it",
    b"\x89PNG": "an image; only text can be read",
    b"\xff\xd8\xff": "an image; only text can be read",
    b"GIF8": "an image; only text can be read",
    b"\x7fELF": "a program; only text can be read",
    **dict.fromkeys(PACKED_SIGNATURES, "a file that is packed twice; unpack it once"),
}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
HTML_PATTERN = re.compile(rb"\s*(<!--.*?-->\s*|<\?xml[^>]*>\s*)*<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)


def detect(file: SourceFile) -> str:
    """Return the format of a file: of its first bytes, else of its suffix, else JSON, HTML or plain text.

    Raise UnreadableFile for a file that is empty or of a kind that cannot be read.
    """
    head = file.head()
    found = next((name for start, name in SIGNATURES.items() if head.startswith(start)), None)
    if found:
        return found
    _check_is_text(file, head)
    text = head.decode("utf-16" if head.startswith(UTF16_MARKS) else "utf-8-sig", "replace").lstrip()
    named = SUFFIXES.get(file.suffix)
    is_json = text[:1] in ("{", "[") if named is None else named in ("json", "jsonl")
    if is_json or (named == "txt" and _is_object(text)):
        return _json_form(text, named)
    if named in ("parquet", "arrow", "pdf"):
        raise UnreadableFile(f"{file.label}: expected a {named} file by its name, found text; correct its name")
    if HTML_PATTERN.match(head) and named in (None, "csv", "txt"):
        return "html"
    if named is None and text.startswith("<?xml"):
        raise UnreadableFile(f"{file.label}: an XML file; save its text as text, HTML or JSON")
    return named or "txt"


def check(file: SourceFile, format: str) -> None:
    """Raise UnreadableFile if the first bytes of a file are not of the format that the settings name."""
    head = file.head()
    found = next((name for start, name in SIGNATURES.items() if head.startswith(start)), None)
    if found not in (None, format):
        raise UnreadableFile(f"expected {format} in {file.label}, found {found}; correct or remove `format`")
    if format in SIGNATURES.values():
        if found is None:
            raise UnreadableFile(f"expected {format} in {file.label}, found something else; correct or remove `format`")
    elif head.strip():
        _check_is_text(file, head)


def _check_is_text(file: SourceFile, head: bytes) -> None:
    """Raise UnreadableFile if the first bytes are not text."""
    if not head.strip():
        raise UnreadableFile(f"{file.label}: an empty file")
    other = next((found for start, found in OTHER_SIGNATURES.items() if head.startswith(start)), None)
    if other is None and b"\0" in head and not head.startswith(UTF16_MARKS):
        other = "binary data of an unknown kind; only text, JSON, CSV, Parquet, Arrow, HTML and PDF can be read"
    if other:
        raise UnreadableFile(f"{file.label}: {other}")


def _is_object(text: str) -> bool:
    """Whether the first line is a JSON object: lines of JSON in a file that is called text."""
    try:
        return isinstance(json.loads(text.partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _json_form(text: str, named: str | None) -> str:
    """Return jsonl if each line is a value of its own, else json."""
    first, _, rest = text.partition("\n")
    if first.startswith("["):
        return "json"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "jsonl" if named == "jsonl" and first.strip() != "{" else "json"
    return "jsonl" if rest.strip() or named == "jsonl" else "json"


def read(file: SourceFile, format: str, by_paragraph: bool, records: str | None, row_keys: Set[str]) -> Rows:
    """Yield the rows of a file in a format of FILE_FORMATS.

    `records` is the path of the list of rows in a JSON value; an object with one of `row_keys` is a row.
    """
    if format in DOCUMENT_FORMATS:
        found = documents.read(file, format, by_paragraph)
    elif format == "json" or (format == "jsonl" and file.head().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")):
        found = json_values.read_values(file, records, row_keys)
    elif format == "jsonl":
        found = json_values.read_lines(file, records)
    else:
        found = TABULAR_READERS[format](file)
    yield from _with_place(file, found)


def _with_place(file: SourceFile, found: Rows) -> Rows:
    """Yield the rows; raise UnreadableFile with the place for an error of a library, such as a truncated file."""
    import pyarrow as pa

    place = ""
    try:
        for position, row in found:
            place = position
            yield position, row
    except (*READ_ERRORS, pa.ArrowException, UnicodeDecodeError) as error:
        where = f"after {place}" if place else "at its beginning"
        raise UnreadableFile(f"{file.label} could not be read {where}: {error}; restore or correct the file") from error


TABULAR_READERS: dict[str, Callable[[SourceFile], Any]] = {
    "csv": delimited.read,
    "parquet": columnar.read_parquet,
    "arrow": columnar.read_arrow,
}
