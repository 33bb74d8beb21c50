"""Loads the rows of a file or an iterator into a `Reading`: each is added, or rejected with its position and reason."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from tasks.common.harness.job import StageError
from tasks.ingest import annotations, columns, formats, importers, json_values, layouts, rows
from tasks.ingest.delimited import PROBLEM
from tasks.ingest.layouts import Detected
from tasks.ingest.reading import Reading
from tasks.ingest.source_files import Rows, SourceFile, UnreadableFile
from tasks.ingest.turns import Reasoning

RowConverter = Callable[[Any], Mapping[str, Any]]  # from a decoded row of a source to a row of a table
SAMPLE_ROWS = 20  # whose columns decide how the rows of a file are read
EXAMPLE_COLUMNS = {  # what `columns` may say for a table
    "corpus": "{text: ...}", "instructions": "{instruction: ..., output: ...}",
    "rankings": "{prompt: ..., chosen: ..., rejected: ...}",
}  # fmt: skip


class UnknownColumnsError(UnreadableFile):
    """The columns of a file's rows are in no known form."""


@dataclass(frozen=True)
class RowOptions:
    """How the rows of a source are read; None is detected from the file."""

    table: str | None = None
    file_format: str | None = None  # one of formats.FILE_FORMATS
    layout: str | None = None  # one of layouts.LAYOUTS
    columns: Mapping[str, str] = field(default_factory=dict)
    paragraph_formats: tuple[str, ...] = ()  # formats of documents that are split into paragraphs
    records: str | None = None
    reasoning: Reasoning = "reject"

    @property
    def row_keys(self) -> frozenset[str]:
        """The keys that say that an object is a row, not a wrapper around rows."""
        mapped = {name.partition(".")[0] for value in self.columns.values() for name in columns.fields_of(value)}
        return layouts.ROW_KEYS | mapped

    def rename(self, row: Any) -> Any:
        """Return a decoded row with the columns that the source maps."""
        return columns.compile_columns(self.columns)(row)


@dataclass(frozen=True)
class OpenedRows:
    """The rows of a file, of which the first were read to find out how to read all."""

    file_format: str
    detected: Detected
    rows: Rows


def open_rows(file: SourceFile, options: RowOptions, columns_found: dict[str, None] | None = None) -> OpenedRows:
    """Return the rows of a file and how they are read; `columns_found` receives the names of its columns.

    Raise UnreadableFile if the file cannot be read, or if its rows are in no known form.
    """
    form = options.file_format or formats.detect(file)
    if options.file_format:
        formats.check(file, form)
    by_paragraph = form in options.paragraph_formats
    found, sample, problem = _peek(formats.read(file, form, by_paragraph, options.records, options.row_keys), options)
    if columns_found is not None:
        columns_found |= dict.fromkeys(str(name) for name in sample if name not in options.columns)
    if form in formats.DOCUMENT_FORMATS and options.table is None:
        return OpenedRows(form, Detected("corpus", layouts.OWN), found)
    detected = layouts.detect(sample, options.table, options.layout, options.columns)
    if detected is None:
        error = UnknownColumnsError if sample and not _judges_replies(sample) else UnreadableFile
        raise error(f"{file.label}: {_describe_unknown(sample, options.table, problem)}")
    if form in formats.TABULAR_FORMATS:
        _check_columns(file, detected, sample)
    return OpenedRows(form, detected, found)


def load_file(file: SourceFile, options: RowOptions, reading: Reading) -> str:
    """Load the rows of a file, and return why none of them fits the table, or an empty text.

    Raise UnreadableFile if the file cannot be read, or cannot be read further.
    """
    opened = open_rows(file, options, reading.columns)
    reading.note_format(opened.file_format, opened.detected.format, opened.detected.columns, file.label)
    return load_rows(opened.detected, opened.rows, file.label, reading, options)


def load_iterated(found: Rows, label: str, kind: str, options: RowOptions, reading: Reading) -> None:
    """Load rows that are in no file; raise StageError if they are in no known form, or if none fits the table."""
    found, sample, problem = _peek(found, options)
    detected = layouts.detect(sample, options.table, options.layout, options.columns)
    if detected is None:
        raise StageError(f"source {reading.source}: {_describe_unknown(sample, options.table, problem)}.")
    reading.note_format(kind, detected.format, detected.columns, label)
    unusable = load_rows(detected, found, label, reading, options)
    if unusable:
        raise StageError(f"source {reading.source}: {unusable}.")


def load_layout(layout: importers.Layout, file: SourceFile, reading: Reading) -> str:
    """Load a file whose format, columns and tags another tool's list of data sets gives; return as `load_file`."""
    form = formats.detect(file)
    found = formats.read(file, form, False, None, layouts.ROW_KEYS.union(layout.columns.values()))
    detected = Detected(layout.table, layout.format)
    reading.note_format(form, detected.format, {}, file.label)
    return _load(detected, found, file.label, reading, lambda row: layout.convert(layouts.decode_cells(row)))


def load_rows(detected: Detected, found: Rows, label: str, reading: Reading, options: RowOptions) -> str:
    """Convert and add rows, given as (position, row); reject invalid ones with position and reason.

    Return why none of them fits the table, because then the file has another schema; else an empty text.
    """
    required = frozenset(layouts.known_columns(None, detected.table)) - layouts.MAY_BE_ABSENT
    rename = columns.compile_columns({**options.columns, **detected.columns}, required)
    convert = layouts.make_converter(detected, options.reasoning)
    if detected.format in annotations.ANSWER_SPLITTERS:
        expanded = annotations.expand_answers(detected.format, found, lambda row: rename(_decode(row)))
        return _load(detected, expanded, label, reading, convert)
    return _load(detected, found, label, reading, lambda row: convert(rename(row)))


def _load(detected: Detected, found: Rows, label: str, reading: Reading, convert: RowConverter) -> str:
    count, rejections, first_reason = 0, 0, ""
    for position, row in found:
        count += 1
        try:
            rows.add_row(detected.table, convert(_decode(row)), reading)
        except ValueError as error:
            place = f"{label}, {position}" if position else label
            first_reason = first_reason or f"{position or label}: {error}"
            rejections += 1
            reading.rows_read += 1
            reading.reject(_as_text(row), f"{place}: {error}")
        if reading.limit_reached:
            return ""
    if not count:
        return f"expected rows of {detected.table} in {label}, found none; add rows, or remove the file"
    if rejections == count:
        return f"none of the {count} rows of {label} is a row of {detected.table}; {first_reason}"
    return ""


def _peek(found: Rows, options: RowOptions) -> tuple[Rows, Mapping[str, Any], str]:
    """Return the rows, a row with the columns of the first ones as the source maps them, and what is wrong with one.

    An error after the first row is raised when the rows before it have been loaded.
    """
    first: list[tuple[str, Any]] = []
    try:
        first.extend(islice(found, SAMPLE_ROWS))
    except UnreadableFile as error:
        if not first:
            raise
        found = _raise_later(error)
    sample: dict[str, Any] = {}
    problem = ""
    for position, row in reversed(first):
        try:
            renamed = options.rename(_decode(row))
        except ValueError as error:
            problem = f"{position}: {error}"
            continue
        sample |= {name: value for name, value in renamed.items() if value is not None or name not in sample}
    return chain(first, found), sample, problem


def _raise_later(error: UnreadableFile) -> Rows:
    yield from ()
    raise error


def _describe_unknown(sample: Mapping[str, Any], table: str | None, problem: str) -> str:
    if not sample:
        return f"expected rows with columns, found none; {problem or 'add rows, or remove it'}"
    found = f"the columns {', '.join(map(str, sample))} are no known form of rows of {table or 'a table'}"
    if _judges_replies(sample) and table != "corpus":
        return (
            f"{found}: label judges each reply alone, thumbs up or down. Rankings need two or more replies to a prompt "
            "(prompt, chosen, rejected); as conversations, keep only the replies that people liked and leave label out"
        )
    say_table = "with `table` what the rows are (corpus, instructions, rankings) and " if table is None else ""
    shown = [EXAMPLE_COLUMNS[table]] if table in EXAMPLE_COLUMNS else list(EXAMPLE_COLUMNS.values())
    examples = " or ".join([", ".join(shown[:-1]), shown[-1]] if shown[1:] else shown)
    return f"{found}; say {say_table}with `columns` which of these are read, such as columns: {examples}"


def _judges_replies(sample: Mapping[str, Any]) -> bool:
    """Whether rows have a thumb up or down for one reply each, as for TRL's KTO."""
    return isinstance(sample.get("label"), bool)


def _check_columns(file: SourceFile, detected: Detected, sample: Mapping[str, Any]) -> None:
    """Raise UnreadableFile if a file whose rows all have the same columns lacks one of the table's."""
    expected = rows.REQUIRED_COLUMNS[detected.table] if detected.format == layouts.OWN else set()
    missing = expected - sample.keys() - detected.columns.keys()
    if missing:
        wanted, found, lacking = (", ".join(sorted(map(str, names))) or "none" for names in (expected, sample, missing))
        raise UnknownColumnsError(
            f"{file.label} lacks columns of {detected.table}. Expected {wanted}; found {found}. Missing: {lacking}. "
            "Name them with `columns`"
        )


def _decode(row: Any) -> Mapping[str, Any]:
    if isinstance(row, bytes):
        try:
            row = json_values.decode(row)
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from error
    if isinstance(row, str):  # of a list of texts
        return {"text": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with columns, found {type(row).__name__}")
    if PROBLEM in row:
        raise ValueError(row[PROBLEM])
    return row


def _as_text(row: Any) -> str:
    """Return a row as it is stored with its reason."""
    if isinstance(row, bytes):
        return row.decode("utf-8", "backslashreplace").rstrip("\r\n")
    return json.dumps(row, ensure_ascii=False, default=str)
