"""The kinds of source that `ingest.sources` may list, their settings, and how each is read."""

import hashlib
import json
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tasks.common import draw, identity
from tasks.common.settings import Settings, known_address
from tasks.common.sources import annotations, archives, formats, importers, preferences, readers, remote, rows
from tasks.common.sources.reading import Reading
from tasks.common.stage import StageError

GROUP = r"^[\w.-]+$"
RESERVED = ("statements", "prose")  # what a mixture calls all documents with names, and all without
Table = Literal["corpus", "instructions", "rankings", "facts", "ratings"]
BUILDERS = ("csv", "json", "parquet", "text")
Format = Literal[
    "txt", "jsonl", "csv", "parquet", "alpaca", "sharegpt", "openai", "preference", "argilla", "label_studio"
]  # fmt: skip
FORMAT = "Format of the file; the last six are other tools' conversations and rankings as JSON, JSON lines or Parquet"
Meaning = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # from a row as it was found to one of a table
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


def _free(group: str) -> str:
    if group in RESERVED:
        raise ValueError(
            f"{' and '.join(RESERVED)} are what mixtures call documents with and without names of entities"
        )
    return group


def _address(url: str) -> str:
    if "://" not in url:
        raise ValueError("an address has a scheme (s3://bucket/file); a file under data/sources/ is of kind `files`")
    return known_address(url)


Group = Annotated[str, Field(pattern=GROUP), AfterValidator(_free)] | None
SourcePath = Annotated[str, Field(min_length=1), AfterValidator(_inside)]


class Named(Settings):
    """What every source has."""

    name: Annotated[str, AfterValidator(_free)] = Field(
        description="Name of the source; it stands in every row", pattern=GROUP
    )
    licence: str = Field(description="Licence of its content (an SPDX name where there is one)", min_length=1)


class Told(Named):
    """A source that may hold documents."""

    group: Group = Field(
        description="What mixtures may call its documents by, with others of their kind; null for none"
    )


def _fit_together(source: "Files | Remote | Dataset") -> None:
    """Raise ValueError for a group of what holds no documents, and for a format that cannot hold the table's rows."""
    if source.group is not None and source.table in ("instructions", "rankings"):
        raise ValueError(f"a group is of documents, and {source.table} are none; set group to null")
    form = getattr(source, "format", None)
    if form == "txt" and source.table != "corpus":
        raise ValueError("a txt file holds paragraphs for the corpus table")
    tables = importers.FORMATS.get(form or "", (source.table,))
    if source.table not in tables:
        raise ValueError(f"the format {form} is for the table{'s' * (len(tables) > 1)} {' and '.join(tables)}")


def _refuse_unknown(columns: Mapping[str, str], read: set[str]) -> None:
    """Raise ValueError for a column that nobody would read: a misspelt one would be dropped without a word."""
    unknown = sorted(set(columns) - read)
    if unknown:
        raise ValueError(f"columns: nothing reads {', '.join(unknown)}; what is read is {', '.join(sorted(read))}")


class Package(Told):
    """A pinned archive from a package index."""

    kind: Literal["package"]
    requirement: str = Field(description="Exact package version", pattern=r"^[\w.-]+==[\w.+!-]+$")
    archive: Literal["wheel", "sdist"] = Field(description="Form of the archive")
    sha256: str = Field(description="Hash of the archive", pattern=r"^[0-9a-f]{64}$")
    reader: Literal["countries", "elements", "speeches", "ratings"] = Field(description="What understands its members")
    members: str = Field(description="Pattern of the members to read", min_length=1)
    limit: int | None = Field(description="Most characters of prose to take; null takes all", ge=1)


class Files(Told):
    """A file under `data/sources/`."""

    kind: Literal["files"]
    path: SourcePath = Field(description="Path under data/sources/")
    format: Format = Field(description=FORMAT)
    table: Table = Field(description="What its rows are")

    @model_validator(mode="after")
    def _fits(self) -> "Files":
        _fit_together(self)
        return self


class LlamaFactory(Named):
    """Data sets of a LLaMA-Factory `dataset_info.json` whose files lie beside it."""

    kind: Literal["llamafactory"]
    path: SourcePath = Field(description="Path of the dataset_info.json under data/sources/")
    datasets: list[str] = Field(description="Names of its data sets to read", min_length=1)

    @property
    def group(self) -> None:
        """It holds conversations and rankings, no documents that a mixture could call by a group."""


class Dataset(Told):
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
        _fit_together(self)
        if (self.path in BUILDERS) != bool(self.data_files):
            raise ValueError(f"data_files belong to the builders {', '.join(BUILDERS)}, and to them alone")
        if self.on_hub and self.revision is None:
            raise ValueError("a dataset on the hub needs revision, the 40 digits of a commit: branches and tags move")
        needed = preferences.NEEDED if self.of_preferences else rows.REQUIRED[self.table]
        lacking = sorted(set(needed) - set(self.columns))
        if lacking:
            raise ValueError(f"columns must say where {', '.join(lacking)} of table {self.table} is found")
        _refuse_unknown(self.columns, preferences.READ if self.of_preferences else rows.read_of(self.table))
        return self

    @property
    def of_preferences(self) -> bool:
        """Whether its rows are pairs of a chosen and a rejected reply."""
        return self.table == "rankings" and not self.columns.keys().isdisjoint(preferences.NEEDED)

    @property
    def on_hub(self) -> bool:
        """Whether the path names a dataset on the hub."""
        return self.path not in BUILDERS and not self.path.startswith("./")


class File(Settings):
    """One file of a remote source."""

    url: Annotated[str, AfterValidator(_address)] = Field(
        description="Any fsspec address: s3://, gs://, https://, file://"
    )
    sha256: str = Field(description="Hash of the file", pattern=r"^[0-9a-f]{64}$")


class Remote(Told):
    """Files on object storage, each pinned by its hash."""

    kind: Literal["remote"]
    files: list[File] = Field(description="The files, in the order in which they are read", min_length=1)
    format: Format = Field(description=FORMAT)
    table: Table = Field(description="What their rows are")
    columns: dict[str, str] = Field(description="The table's column: the files' column; empty where they are the same")
    limit: int | None = Field(description="Most characters of prose to take; null takes all", ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "Remote":
        _fit_together(self)
        if self.columns and self.format in ("txt", *importers.FORMATS):
            raise ValueError(f"a file of the format {self.format} has no columns to name; leave `columns` empty ({{}})")
        if self.limit is not None and self.table != "corpus":
            raise ValueError("limit counts characters of prose, so it belongs to the corpus table; set it to null")
        _refuse_unknown(self.columns, rows.read_of(self.table))
        return self


class Rankings(Named):
    """A folder of Parquet files with people's rankings; it may be empty."""

    kind: Literal["rankings"]
    path: SourcePath = Field(description="Folder under data/sources/")

    @property
    def group(self) -> None:
        """It holds no documents that a mixture could call by a group."""


Source = Annotated[Package | Files | LlamaFactory | Remote | Dataset | Rankings, Field(discriminator="kind")]


def read_source(source: Source, folder: Path, reading: Reading) -> None:
    """Read one source; `folder` is data/sources. Raise StageError with its name, what was expected and what found."""
    opened: dict[type, Callable[[Any, Path, Reading], None]] = {
        Package: _package, Files: _files, LlamaFactory: _llamafactory, Remote: _remote, Dataset: _dataset,
        Rankings: _rankings,
    }  # fmt: skip
    opened[type(source)](source, folder, reading)


def _package(source: Package, folder: Path, reading: Reading) -> None:
    path = archives.fetch(source.name, source.requirement, source.archive, source.sha256)
    reading.sha256, reading.files, reading.limit = source.sha256, {path.name: source.sha256}, source.limit
    try:
        readers.READERS[source.reader](archives.members(source.name, path, source.members), reading)
    except MALFORMED as error:
        raise StageError(
            f"source {source.name}: expected an archive with members that the reader {source.reader!r} understands, "
            f"found {path.name} in another form ({type(error).__name__}: {error}); mend `reader` or `members`."
        ) from error


def _files(source: Files, folder: Path, reading: Reading) -> None:
    path = folder / source.path
    if not path.is_file():
        raise StageError(f"source {source.name}: expected a file at {path}, found none. Put it there or mend `path`.")
    reading.sha256 = identity.file_hash(path)
    reading.files = {source.path: reading.sha256}
    _take(source.table, source.format, path, path.name, reading)


def _llamafactory(source: LlamaFactory, folder: Path, reading: Reading) -> None:
    path = folder / source.path
    try:
        entries = importers.dataset_info(path, source.datasets, folder)
    except ValueError as error:
        raise StageError(f"source {source.name}: {error}.") from error
    for file in (path, *(entry.path for entry in entries)):
        reading.files[str(file.relative_to(folder))] = identity.file_hash(file)
    reading.sha256 = draw.digest(*reading.files.values())
    for entry in entries:
        _import(entry.layout, entry.path, entry.path.name, reading)


def _remote(source: Remote, folder: Path, reading: Reading) -> None:
    reading.limit = source.limit
    reading.files = {file.url: file.sha256 for file in source.files}
    reading.sha256 = draw.digest(*(file.sha256 for file in source.files))
    for file in source.files:
        if not reading.full:
            path = remote.fetch(source.name, file.url, file.sha256)
            _take(source.table, source.format, path, file.url, reading, source.columns)


def _rankings(source: Rankings, folder: Path, reading: Reading) -> None:
    path = folder / source.path
    if not path.is_dir():
        raise StageError(
            f"source {source.name}: expected a folder at {path} (it may be empty), found none; mend `path`."
        )
    files = sorted(path.glob("*.parquet"))
    others = [file.name for file in sorted(path.iterdir()) if file not in files and not file.name.startswith(".")]
    if others:
        raise StageError(
            f"source {source.name}: expected Parquet files alone in {path}, found {', '.join(others)}, which would not "
            "be read; list it as a source of kind files with table rankings, or take it away."
        )
    reading.files = {file.name: identity.file_hash(file) for file in files}
    reading.sha256 = draw.digest(*reading.files.values())
    for file in files:
        _take("rankings", "parquet", file, file.name, reading)


def _take(
    table: str, format: str, path: Path, called: str, reading: Reading, columns: Mapping[str, str] | None = None
) -> None:
    """Take the rows of a file, which is `called` so in reasons; `columns` renames those that are called otherwise."""
    if format in importers.FORMATS:
        _import(importers.Layout(format, table), path, called, reading)
        return
    told = columns or {}
    wanted = {told.get(name, name) for name in rows.REQUIRED[table]} | set(told.values())
    found = formats.FORMATS[format](reading.source, path, wanted)
    _take_rows(table, found, called, reading, partial(_renamed, told))


def _import(layout: importers.Layout, path: Path, called: str, reading: Reading) -> None:
    """Take the conversations, preferences or rankings of a file of another tool."""
    found = formats.objects(reading.source, path)
    if layout.format in annotations.ANSWERS:
        found = annotations.spread(layout.format, found)
    _take_rows(layout.table, found, called, reading, layout.convert)


def _take_rows(
    table: str, found: Iterable[tuple[str, Any]], called: str, reading: Reading, meaning: Meaning = dict
) -> None:
    """Take rows as they are meant; a bad one is refused with its place. Where none fits, it is another schema: stop."""
    count, refusals, first = 0, 0, ""
    for place, row in found:
        count += 1
        try:
            rows.add(table, meaning(_decoded(row)), reading)
        except ValueError as error:
            first = first or f"{place}: {error}"
            refusals += 1
            reading.read += 1
            reading.refuse(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str),
                           f"{called}, {place}: {error}")  # fmt: skip
        if reading.full:
            return
    if not count:
        raise StageError(
            f"source {reading.source}: expected rows of {table} in {called}, found none; put some there, or take "
            "it away."
        )
    if refusals == count:
        raise StageError(f"source {reading.source}: none of the {count} rows of {called} is a row of {table}; {first}.")


def _renamed(columns: Mapping[str, str], row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**row, **{name: row.get(found) for name, found in columns.items()}}


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


def _dataset(source: Dataset, folder: Path, reading: Reading) -> None:
    """Take a dataset's rows as they come; their hash, which no file of the hub's cache has, grows with them."""
    hashed = hashlib.sha256()

    def rows_of() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(_readable(source, folder), 1):
            head = "\x00" if number > 1 else ""
            content = head + json.dumps(row, sort_keys=True, default=str)
            hashed.update(content.encode("utf-8", "surrogatepass"))
            yield f"row {number}", row

    _take_rows(source.table, rows_of(), source.path, reading, preferences.convert if source.of_preferences else dict)
    reading.files = {name: identity.file_hash(folder / name) for name in source.data_files}
    reading.sha256 = hashed.hexdigest()


def _readable(source: Dataset, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows; a streamed dataset fails only here, while it is read."""
    from datasets.exceptions import DatasetsError

    try:
        yield from _dataset_rows(source, folder)
    except (DatasetsError, *UNREADABLE) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise StageError(
            f"source {source.name}: expected the dataset {source.path} (config {source.config}, split {source.split}, "
            f"revision {source.revision}), but it could not be read: {error}{cause}"
        ) from error


def _dataset_rows(source: Dataset, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows under the table's column names."""
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
