"""Settings of the kinds of source that `ingest.sources` may list; `source_reading.py` reads them."""

import codecs
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, model_validator

from tasks.common.settings import Settings, validate_url
from tasks.common.source_names import NAME_PATTERN, RESERVED_NAMES
from tasks.ingest import columns, formats, importers, layouts
from tasks.ingest.row_loading import RowOptions
from tasks.ingest.turns import Reasoning

Table = Literal["corpus", "instructions", "rankings", "facts", "ratings"]
READER_TABLES: dict[str, tuple[Table, ...]] = {  # that the reader of a package fills, the main one first
    "countries": ("facts",), "elements": ("facts", "corpus"), "speeches": ("corpus",), "ratings": ("ratings",),
}  # fmt: skip
BUILDERS = ("csv", "json", "parquet", "text")
SQLITE_PREFIX = "sqlite:///"
PLACEHOLDER = r"\$\{\w+\}"  # an environment variable in a URL
UNKNOWN_LICENCE = "unknown"
PARAGRAPH_FORMATS = ("txt", "md")  # split into paragraphs if the source names one file
RowFormat = Literal["openai", "alpaca", "sharegpt", "preference", "answers", "argilla", "label_studio"]
Format = Literal[
    "txt", "md", "html", "pdf", "json", "jsonl", "csv", "parquet", "arrow",
    "openai", "alpaca", "sharegpt", "preference", "answers", "argilla", "label_studio",
]  # fmt: skip
FORMAT_DESCRIPTION = (
    "Format of the files, or, from `openai` on, of their rows as another tool writes them; null: detected for each file"
)
REASONING_DESCRIPTION = (
    "Replies with reasoning beside their content (reasoning_content, thinking): rejected; keep: it is put before the "
    "reply as <think>...</think>; drop: it is left out"
)
TABLE_DESCRIPTION = (
    "Table of its rows; those of facts and ratings become rows of the others; null: detected from the columns"
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


def _validate_database(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        path = url.removeprefix(SQLITE_PREFIX)
        if path == url or not path.strip("/"):
            raise ValueError(f"expected sqlite:///FILE with a file under data/sources/, found {url}")
        _validate_path(path)
    elif parts.scheme in ("postgresql", "postgres"):
        is_written = parts.password and not re.fullmatch(PLACEHOLDER, parts.password)
        if is_written or "password" in parse_qs(parts.query):
            raise ValueError(
                "a password in params.yaml would be in every record: write ${NAME} in its place, and set the "
                "environment variable NAME"
            )
    else:
        raise ValueError(f"expected a URL of sqlite or postgresql, found {parts.scheme or 'none'}://")
    return url


Group = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_validate_name)] | None
SourcePath = Annotated[str, Field(min_length=1), AfterValidator(_validate_path)]


def _validate_encoding(name: str) -> str:
    try:
        if codecs.lookup(name)._is_text_encoding:
            return name
    except LookupError:
        pass
    raise ValueError(f"expected an encoding of text, such as windows-1252 or shift_jis; found {name}")


class SourceSettings(Settings):
    """Settings that every kind of source has."""

    name: Annotated[str, AfterValidator(_validate_name)] = Field(
        default="unnamed", description="Name of the source, a column of every row; by default made from its path",
        pattern=NAME_PATTERN,
    )  # fmt: skip
    licence: str = Field(
        default=UNKNOWN_LICENCE, description="Licence of its content (an SPDX name where there is one)", min_length=1
    )


class DocumentSource(SourceSettings):
    """A source that may contain documents."""

    group: Group = Field(
        default=None, description="Name for its documents, and those of other sources, in mixtures; null for none"
    )


class RowSettings(DocumentSource):
    """A source of rows with columns."""

    table: Table | None = Field(default=None, description=TABLE_DESCRIPTION)
    columns: dict[str, str] = Field(
        default={},
        description="Column of the table or format: where it is in the rows; a field, a path (meta.body.0.text), or a "
        "template over fields ({title}\\n{body})",
    )
    reasoning: Reasoning = Field(default="reject", description=REASONING_DESCRIPTION)

    @property
    def layout(self) -> str | None:
        """The format of the rows, if it is another tool's."""
        chosen = getattr(self, "format", None)
        return chosen if chosen in layouts.LAYOUTS else None

    @property
    def options(self) -> RowOptions:
        """How the rows are read."""
        return RowOptions(table=self.table, layout=self.layout, columns=self.columns, reasoning=self.reasoning)

    @model_validator(mode="after")
    def _check_rows(self) -> "RowSettings":
        """Reject a group of a table without documents, a format that does not fit the table, and unread columns."""
        chosen = getattr(self, "format", None)
        if self.group is not None and self.table in ("instructions", "rankings"):
            raise ValueError(f"`group` applies only to documents, not to {self.table}; set group to null")
        if chosen in formats.DOCUMENT_FORMATS and self.table not in ("corpus", None):
            raise ValueError(f"a {chosen} file contains documents for the table corpus, not for {self.table}")
        tables = importers.FORMAT_TABLES.get(self.layout or "", ())
        if self.table is not None and tables and self.table not in tables:
            raise ValueError(
                f"the format {self.layout} is for the table{'s' * (len(tables) > 1)} {' and '.join(tables)}"
            )
        _check_columns(self.columns, layouts.known_columns(self.layout, self.table))
        return self


def _check_columns(mapping: Mapping[str, str], known: set[str]) -> None:
    """Raise ValueError for a column that is never read, which would be dropped silently, and for a bad template."""
    unknown = sorted(set(mapping) - known)
    if unknown:
        raise ValueError(f"columns: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    for name, value in mapping.items():
        try:
            columns.fields_of(value)
        except ValueError as error:
            raise ValueError(f"columns.{name}: {error}") from error


class FileRows(RowSettings):
    """A source of files."""

    format: Format | None = Field(default=None, description=FORMAT_DESCRIPTION)
    by: Literal["document", "paragraph"] | None = Field(
        default=None,
        description="What a row of txt, md, html and pdf files is; null: paragraphs of a txt or md file that is named "
        "by itself, else documents",
    )
    encoding: Annotated[str, AfterValidator(_validate_encoding)] | None = Field(
        default=None, description="Encoding of text files; null: UTF-8, UTF-16 or Windows-1252, as found in their bytes"
    )
    records: str | None = Field(
        default=None,
        description="Path of the list of rows inside each JSON value (data.items); null: the items of arrays, and of a "
        "wrapper with one list",
        min_length=1,
    )

    def options_for(self, *, named: bool) -> RowOptions:
        """Return how the files are read; `named`: whether the source names each of them."""
        by_paragraph = {"paragraph": formats.DOCUMENT_FORMATS, "document": (), None: PARAGRAPH_FORMATS if named else ()}
        return replace(
            self.options,
            file_format=self.format if self.format in formats.FILE_FORMATS else None,
            paragraph_formats=by_paragraph[self.by],
            records=self.records,
        )


class Package(DocumentSource):
    """A pinned archive from a package index."""

    kind: Literal["package"] = Field(description="Kind of source")
    requirement: str = Field(description="Exact package version", pattern=r"^[\w.-]+==[\w.+!-]+$")
    archive: Literal["wheel", "sdist"] = Field(description="Form of the archive")
    sha256: str = Field(description="Hash of the archive", pattern=r"^[0-9a-f]{64}$")
    reader: Literal["countries", "elements", "speeches", "ratings"] = Field(description="Reader of its members")
    members: str = Field(description="Pattern of the members to read", min_length=1)
    limit: int | None = Field(default=None, description="Maximum characters of prose to read; null: no limit", ge=1)


class Files(FileRows):
    """Files under `data/sources/`."""

    kind: Literal["files"] = Field(description="Kind of source")
    path: SourcePath = Field(description="A file, a folder or a glob (docs/**/*.md) under data/sources/")


class LlamaFactory(SourceSettings):
    """Data sets of a LLaMA-Factory `dataset_info.json` whose files are beside it."""

    kind: Literal["llamafactory"] = Field(description="Kind of source")
    path: SourcePath = Field(description="Path of the dataset_info.json under data/sources/")
    datasets: list[str] = Field(description="Names of its data sets to read", min_length=1)
    reasoning: Reasoning = Field(default="reject", description=REASONING_DESCRIPTION)

    @property
    def group(self) -> None:
        """None: conversations and rankings are not in mixtures."""


class Dataset(RowSettings):
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
    format: RowFormat | None = Field(default=None, description="Format of its rows; null: detected from their columns")

    @model_validator(mode="after")
    def _check_settings(self) -> "Dataset":
        if (self.path in BUILDERS) != bool(self.data_files):
            raise ValueError(
                f"data_files are required for the builders {', '.join(BUILDERS)}, and must be empty otherwise"
            )
        if self.on_hub and self.revision is None:
            raise ValueError("a dataset on the hub needs revision, the 40 digits of a commit: branches and tags move")
        return self

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


class Remote(FileRows):
    """Files on object storage, each pinned by its hash."""

    kind: Literal["remote"] = Field(description="Kind of source")
    files: list[File] = Field(description="The files, in reading order", min_length=1)
    limit: int | None = Field(default=None, description="Maximum characters of prose to read; null: no limit", ge=1)

    @model_validator(mode="after")
    def _check_settings(self) -> "Remote":
        if self.limit is not None and self.table not in ("corpus", None):
            raise ValueError(
                f"limit counts characters of prose, so it needs the table corpus, not {self.table}; set it to null"
            )
        return self


class Sql(RowSettings):
    """Rows of an SQLite file under `data/sources/`, or of a Postgres database."""

    kind: Literal["sql"] = Field(description="Kind of source")
    url: Annotated[str, AfterValidator(_validate_database)] = Field(
        description="sqlite:///FILE under data/sources/, or postgresql://USER:${PASSWORD}@HOST/DATABASE; ${NAME} is an "
        "environment variable"
    )
    query: str | None = Field(default=None, description="Query whose rows are read; null: `from_table`", min_length=1)
    from_table: str | None = Field(
        default=None, description="Table of the database, all of whose rows are read; null: `query`", min_length=1
    )
    sha256: str | None = Field(
        default=None, description="Hash that the rows must have, as the manifest records it; null: any rows",
        pattern=r"^[0-9a-f]{64}$",
    )  # fmt: skip
    format: RowFormat | None = Field(default=None, description="Format of its rows; null: detected from their columns")

    @property
    def sqlite_path(self) -> str | None:
        """The path of an SQLite file under data/sources; None for a server."""
        return self.url.removeprefix(SQLITE_PREFIX) if self.url.startswith(SQLITE_PREFIX) else None

    @model_validator(mode="after")
    def _check_settings(self) -> "Sql":
        if (self.query is None) == (self.from_table is None):
            raise ValueError("exactly one of query and from_table must be given")
        return self


class Rankings(SourceSettings):
    """A folder of Parquet files with people's rankings. The folder may be empty, a file may not."""

    kind: Literal["rankings"] = Field(description="Kind of source")
    path: SourcePath = Field(description="Folder under data/sources/")

    @property
    def group(self) -> None:
        """None: rankings are not in mixtures."""


Source = Annotated[Package | Files | LlamaFactory | Remote | Dataset | Sql | Rankings, Field(discriminator="kind")]
