"""What the sources provide and what is wrong with them, before any of them is read: takes a second at most.

Files are opened and their first rows are read; nothing is fetched, and no database is asked.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.ingest import file_lists, formats, importers, layouts
from tasks.ingest.row_loading import RowOptions, open_rows
from tasks.ingest.source_files import SourceFile, UnreadableFile
from tasks.ingest.source_settings import (
    PLACEHOLDER,
    READER_TABLES,
    Dataset,
    Files,
    LlamaFactory,
    Package,
    Rankings,
    Remote,
    RowSettings,
    Source,
    Sql,
)

SURVEYED_FILES = 20  # of a folder, evenly spread
ALL_TABLES = ("corpus", "instructions", "rankings", "facts", "ratings")


@dataclass(frozen=True)
class Survey:
    """What one source provides: its tables, as far as they are known before it is read, and its problems."""

    name: str
    tables: frozenset[str]  # that its rows may enter; all that the settings do not rule out if nothing can be read yet
    problems: tuple[str, ...]


def survey(sources: Iterable[Source], folder: Path) -> list[Survey]:
    """Return a survey of each source; `folder` is data/sources."""
    surveyors: dict[type, Callable[[Any, Path], Survey]] = {
        Package: _survey_package, Files: _survey_files, LlamaFactory: _survey_llamafactory, Remote: _survey_remote,
        Dataset: _survey_dataset, Sql: _survey_database, Rankings: _survey_rankings,
    }  # fmt: skip
    return [surveyors[type(source)](source, folder) for source in sources]


def possible_tables(source: RowSettings) -> frozenset[str]:
    """Return the tables that the settings of a source allow: the stated one, or those that read its columns."""
    chosen = getattr(source, "format", None)
    if source.table:
        return frozenset({source.table})
    if chosen in formats.DOCUMENT_FORMATS:
        return frozenset({"corpus"})
    tables = importers.FORMAT_TABLES.get(source.layout or "", ALL_TABLES)
    return frozenset(
        table for table in tables if layouts.known_columns(source.layout, table).issuperset(source.columns)
    )


def _survey_package(source: Package, folder: Path) -> Survey:
    return Survey(source.name, frozenset(READER_TABLES[source.reader]), ())


def _survey_files(source: Files, folder: Path) -> Survey:
    labels, is_one = file_lists.find(folder, source.path)
    if not labels:
        return Survey(source.name, possible_tables(source), (describe_absent(source, folder),))
    chosen = labels[:: max(1, len(labels) // SURVEYED_FILES)][:SURVEYED_FILES]
    tables, problems = _open_files(source, folder, chosen, source.options_for(named=is_one))
    # Of a folder, files that cannot be read are rejected, unless there is no other.
    is_wrong = is_one or (not tables and len(labels) <= SURVEYED_FILES)
    return Survey(source.name, tables or possible_tables(source), problems if is_wrong else ())


def _open_files(
    source: Files | Dataset, folder: Path, labels: Iterable[str], options: RowOptions
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the tables of the files' first rows, and the first problem of one that cannot be read."""
    tables, problems = set[str](), list[str]()
    for label in labels:
        try:
            file = SourceFile(folder / label, label, getattr(source, "encoding", None), is_sampled=True)
            tables.add(open_rows(file, options).detected.table)
        except UnreadableFile as error:
            problems.append(f"source {source.name}: {error}.")
    return frozenset(tables), tuple(problems[:1])


def describe_absent(source: Files, folder: Path) -> str:
    """Return the message for a path that names no file."""
    return (
        f"source {source.name}: expected a file at {folder / source.path}, a folder with files or a pattern of files, "
        "found none. Put them there or correct `path`."
    )


def _survey_llamafactory(source: LlamaFactory, folder: Path) -> Survey:
    try:
        entries = importers.read_dataset_info(folder / source.path, source.datasets, folder)
    except ValueError as error:
        return Survey(source.name, frozenset({"instructions", "rankings"}), (f"source {source.name}: {error}.",))
    return Survey(source.name, frozenset(entry.layout.table for entry in entries), ())


def _survey_remote(source: Remote, folder: Path) -> Survey:
    return Survey(source.name, possible_tables(source), ())


def _survey_dataset(source: Dataset, folder: Path) -> Survey:
    local = [*source.data_files, *([source.path] if source.path.startswith("./") else [])]
    absent = [name for name in local if not (folder / name).exists()]
    if absent:
        problem = f"source {source.name}: expected {', '.join(absent)} in {folder}, found nothing there."
        return Survey(source.name, possible_tables(source), (problem,))
    tables, _ = _open_files(source, folder, source.data_files[:SURVEYED_FILES], source.options)  # read by `datasets`
    return Survey(source.name, tables or possible_tables(source), ())


def _survey_database(source: Sql, folder: Path) -> Survey:
    problem = describe_unreachable(source, folder)
    return Survey(source.name, possible_tables(source), (problem,) if problem else ())


def describe_unreachable(source: Sql, folder: Path) -> str:
    """Return what is missing for a database to be opened, or an empty text."""
    if source.sqlite_path is not None:
        path = folder / source.sqlite_path
        found = path.is_file()
        return "" if found else f"source {source.name}: expected an SQLite file at {path}, found none; correct `url`."
    names = [name[2:-1] for name in re.findall(PLACEHOLDER, source.url)]
    absent = ", ".join(name for name in names if name not in os.environ)
    return f"source {source.name}: the environment variable {absent} in `url` is not set; set it." if absent else ""


def _survey_rankings(source: Rankings, folder: Path) -> Survey:
    problem = describe_no_folder(source, folder)
    filled = any((folder / source.path).glob("*.parquet"))
    return Survey(source.name, frozenset({"rankings"} if filled else ()), (problem,) if problem else ())


def describe_no_folder(source: Rankings, folder: Path) -> str:
    """Return what is wrong with the folder of rankings, or an empty text."""
    path = folder / source.path
    if not path.is_dir():
        return f"source {source.name}: expected a folder at {path} (it may be empty), found none; correct `path`."
    others = [file.name for file in sorted(path.iterdir()) if file.suffix != ".parquet" and file.name[0] != "."]
    if others:
        return (
            f"source {source.name}: expected only Parquet files in {path}, found {', '.join(others)}; list it as a "
            "source of kind files with table rankings, or remove it."
        )
    return ""
