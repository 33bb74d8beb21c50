"""Reads the rows of a database, SQLite or Postgres, through SQLAlchemy: read-only, one batch in memory at a time.

A database has no commit, so its rows cannot be pinned before they are read. The manifest records the hash of the rows,
in their order; with `sha256` in the settings, other rows stop the run. A password comes from an environment variable
and is in no record and no message.
"""

import datetime
import decimal
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tasks.common import identity
from tasks.common.harness.job import StageError
from tasks.ingest import survey
from tasks.ingest.reading import Reading
from tasks.ingest.row_loading import load_iterated
from tasks.ingest.source_files import Rows
from tasks.ingest.source_settings import PLACEHOLDER, Sql

BATCH_ROWS = 1000
CONNECT_SECONDS = 10


def read(source: Sql, folder: Path, reading: Reading) -> None:
    """Load the rows of a query or a table, and compute their hash while they are read."""
    hashed = hashlib.sha256()
    rows = _hash_rows(_read_rows(source, folder), hashed)
    load_iterated(rows, source.from_table or "query", "sql", source.options, reading)
    reading.sha256 = hashed.hexdigest()
    if source.sqlite_path is not None:
        reading.files = {source.sqlite_path: identity.file_hash(folder / source.sqlite_path)}
    if source.sha256 not in (None, reading.sha256):
        raise StageError(
            f"source {source.name}: expected rows with the hash {source.sha256}, found {reading.sha256}: the database "
            "has changed. Change `sha256` if these are the rows to train on."
        )


def _hash_rows(found: Iterator[Mapping[str, Any]], hashed: Any) -> Rows:
    for number, row in enumerate(found, 1):
        plain = {name: _plain(value) for name, value in row.items()}
        hashed.update(json.dumps(plain, sort_keys=True).encode("utf-8", "surrogatepass") + b"\0")
        yield f"row {number}", plain


def _plain(value: Any) -> Any:
    """Return a value of a database as a value of JSON; times, UUIDs and other kinds of their own become text."""
    if isinstance(value, decimal.Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes | memoryview):
        return {"bytes": bytes(value).hex()}  # no text: a row that uses it is rejected
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _read_rows(source: Sql, folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows as they come from the database; raise StageError for any error of it."""
    import sqlalchemy as sa

    url = _fill_url(source, folder)
    arguments = {} if source.sqlite_path is not None else {"connect_timeout": CONNECT_SECONDS}
    try:
        engine = sa.create_engine(url, connect_args=arguments, hide_parameters=True, poolclass=sa.NullPool)
        with engine.connect() as connection:
            yield from _execute(source, connection)
    except (sa.exc.SQLAlchemyError, ImportError, ValueError) as error:
        cause = getattr(error, "orig", None) or error
        raise StageError(
            f"source {source.name}: {source.url} could not be read ({_first_line(cause, url)}); correct `url`, "
            "`query` or `from_table`, or check the database and the environment variables."
        ) from None  # the driver's error may repeat the password


def _execute(source: Sql, connection: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of the query through a cursor on the server."""
    options: dict[str, Any] = {"stream_results": True, "yield_per": BATCH_ROWS, "no_parameters": True}
    if connection.dialect.name == "postgresql":
        options |= {"postgresql_readonly": True, "isolation_level": "REPEATABLE READ"}
    quoted = connection.dialect.identifier_preparer.quote
    table = ".".join(quoted(part) for part in (source.from_table or "").split("."))
    found = connection.execution_options(**options).exec_driver_sql(source.query or f"SELECT * FROM {table}")
    names = list(found.keys())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StageError(
            f"source {source.name}: expected one column of each name, found {', '.join(twice)} more than once; name "
            "them with AS in the query."
        )
    for row in found:
        yield dict(zip(names, row, strict=True))


def _fill_url(source: Sql, folder: Path) -> Any:
    """Return the URL with the values of environment variables; an SQLite file is opened read-only."""
    from sqlalchemy.engine import make_url

    problem = survey.describe_unreachable(source, folder)
    if problem:
        raise StageError(problem)
    if source.sqlite_path is not None:
        return make_url("sqlite://").set(
            database=f"file:{quote(str(folder / source.sqlite_path))}", query={"mode": "ro", "uri": "true"}
        )
    url = make_url(source.url)

    def fill(text: str | None) -> str | None:
        return text and re.sub(PLACEHOLDER, lambda match: os.environ[match[0][2:-1]], text)

    return url.set(
        drivername="postgresql+psycopg", username=fill(url.username), password=fill(url.password), host=fill(url.host),
        database=fill(url.database),
    )  # fmt: skip


def _first_line(error: object, url: Any) -> str:
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return text.replace(url.password, "***") if url.password else text
