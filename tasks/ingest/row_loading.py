"""Loads the rows of a file or an iterator into a `Reading`: each is added, or rejected with its position and reason."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tasks.common.harness.job import StageError
from tasks.ingest import annotations, formats, importers, rows
from tasks.ingest.reading import Reading

RowConverter = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # from a row of a source to a row of a table


def load_file(
    table: str, format: str, path: Path, label: str, reading: Reading, columns: Mapping[str, str] | None = None
) -> None:
    """Load the rows of a file. `label` names it in reasons; `columns` maps the table's columns to the file's."""
    if format in importers.FORMAT_TABLES:
        load_layout(importers.Layout(format, table), path, label, reading)
        return
    renames = columns or {}
    wanted = {renames.get(name, name) for name in rows.REQUIRED_COLUMNS[table]} | set(renames.values())
    found = formats.FORMATS[format](reading.source, path, wanted)
    load_rows(table, found, label, reading, partial(_rename_columns, renames))


def load_layout(layout: importers.Layout, path: Path, label: str, reading: Reading) -> None:
    """Load the conversations, preferences or rankings of another tool's file."""
    found = formats.read_objects(reading.source, path)
    if layout.format in annotations.ANSWER_SPLITTERS:
        found = annotations.expand_answers(layout.format, found)
    load_rows(layout.table, found, label, reading, layout.convert)


def load_rows(
    table: str, found: Iterable[tuple[str, Any]], label: str, reading: Reading, convert: RowConverter = dict
) -> None:
    """Convert and add rows, given as (position, row); reject invalid ones with position and reason.

    Raise StageError if there is no row, or if all are invalid, because then the file has another schema.
    """
    count, rejections, first_reason = 0, 0, ""
    for position, row in found:
        count += 1
        try:
            rows.add_row(table, convert(_decode(row)), reading)
        except ValueError as error:
            first_reason = first_reason or f"{position}: {error}"
            rejections += 1
            reading.rows_read += 1
            reading.reject(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str),
                           f"{label}, {position}: {error}")  # fmt: skip
        if reading.limit_reached:
            return
    if not count:
        raise StageError(
            f"source {reading.source}: expected rows of {table} in {label}, found none; add rows, or remove the file."
        )
    if rejections == count:
        raise StageError(
            f"source {reading.source}: none of the {count} rows of {label} is a row of {table}; {first_reason}."
        )


def _rename_columns(renames: Mapping[str, str], row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**row, **{name: row.get(found) for name, found in renames.items()}}


def _decode(row: Any) -> Mapping[str, Any]:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with columns, found {type(row).__name__}")
    if None in row:  # csv.DictReader stores cells without a column under None
        raise ValueError(f"more cells than columns, {row[None]} too many; a value with a comma needs quotes around it")
    return row
