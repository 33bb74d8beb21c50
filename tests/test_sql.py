"""Databases: SQLite under data/sources, Postgres through a URL whose password is in the environment."""

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common.harness.job import StageError
from tests.data_fixtures import copy_sources, ingest_config, ingest_into, manifest, rejections, table
from tests.servers import free_port

NO_FACTS: dict[str, Any] = {"wordings": None, "names": None, "relations": []}
SHOP = {"kind": "sql", "url": "sqlite:///shop.db", "from_table": "articles", "columns": {"text": "{title}\n{body}"}}
ARTICLES = [(number, f"Title {number}", f"100 % of body {number}" if number % 5 else None) for number in range(40)]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """The sources with an SQLite file of articles and conversations."""
    copied = copy_sources(tmp_path)
    with closing(sqlite3.connect(copied / "shop.db")) as connection, connection:
        connection.execute('create table articles (id integer, title text, body text, "order" blob)')
        connection.executemany("insert into articles values (?, ?, ?, x'00ff')", ARTICLES)
        connection.execute("create table chats (messages text)")
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        connection.execute("insert into chats values (?)", (json.dumps(turns),))
    return copied


def read(folder: Path, copied: Path, **settings: Any) -> Path:
    return ingest_into(folder, copied, **NO_FACTS, sources=[{**SHOP, **settings}])


def test_rows_of_a_table_are_used_or_rejected(shop: Path, tmp_path: Path) -> None:
    folder = read(tmp_path / "out", shop)
    entry = manifest(folder)["articles"]
    assert (entry["read"], entry["used"], entry["rejected"]) == (40, 32, 8)
    assert "Title 1\n100 % of body 1" in {row["text"] for row in table(folder, "corpus")}
    assert rejections(folder)[0]["reason"] == "articles, row 1: body is null, which the template of text needs"
    assert json.loads(rejections(folder)[0]["row"])["order"] == {"bytes": "00ff"}
    assert list(entry["files"]) == ["shop.db"]
    again = read(tmp_path / "again", shop, sha256=entry["sha256"])
    assert manifest(again)["articles"]["sha256"] == entry["sha256"]


def test_other_rows_than_the_pinned_ones_stop_the_run(shop: Path, tmp_path: Path) -> None:
    sha256 = manifest(read(tmp_path / "out", shop))["articles"]["sha256"]
    with closing(sqlite3.connect(shop / "shop.db")) as connection, connection:
        connection.execute("update articles set body = 'new' where id = 3")
    with pytest.raises(StageError, match=rf"expected rows with the hash {sha256}, found .*: the database has changed"):
        read(tmp_path / "other", shop, sha256=sha256)


def test_a_query_is_read_as_it_is(shop: Path, tmp_path: Path) -> None:
    """Colons and per cent signs are no parameters."""
    query = (
        "select title || ': 5 %s' as text from articles where body like '100 %' and title <> ':x' order by id limit 3"
    )
    folder = read(tmp_path / "out", shop, from_table=None, query=query, columns={})
    assert {row["text"] for row in table(folder, "corpus")} == {f"Title {number}: 5 %s" for number in (1, 2, 3)}


def test_conversations_are_json_in_a_column(shop: Path, tmp_path: Path) -> None:
    folder = read(tmp_path / "out", shop, from_table="chats", columns={})
    assert [row["messages"][-1]["content"] for row in table(folder, "instructions")] == ["Hello!"]


def test_a_database_is_opened_read_only(shop: Path, tmp_path: Path) -> None:
    before = (shop / "shop.db").read_bytes()
    with pytest.raises(StageError, match="attempt to write a readonly database"):
        read(tmp_path / "out", shop, from_table=None, query="delete from articles returning title as text", columns={})
    assert (shop / "shop.db").read_bytes() == before


def test_a_file_may_have_any_name(shop: Path, tmp_path: Path) -> None:
    (shop / "shop.db").rename(shop / "my shop #1 100%.db")
    folder = read(tmp_path / "out", shop, url="sqlite:///my shop #1 100%.db")
    assert manifest(folder)["articles"]["read"] == 40


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"from_table": None, "query": "select title as text, body as text from articles", "columns": {}},
            "source sql: expected one column of each name, found text more than once; name them with AS in the query",
        ),
        (
            {"url": "sqlite:///none.db"},
            "source articles: expected an SQLite file at .*none.db, found none; correct `url`",
        ),
        (
            {"from_table": "none", "name": "articles"},
            r"source articles: sqlite:///shop.db could not be read \(no such table",
        ),
        ({"columns": {}}, "the columns id, title, body, order are no known form of rows of a table; say with `table`"),
    ],
)
def test_a_database_that_cannot_be_read_is_reported(
    shop: Path, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(StageError, match=expected):
        read(tmp_path / "out", shop, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"url": "postgresql://me:secret@host/db"},
            "a password in params.yaml would be in every record: write ${NAME}",
        ),
        ({"url": "postgresql://host/db?password=secret"}, "a password in params.yaml would be in every record"),
        ({"url": "mysql://host/db"}, "expected a URL of sqlite or postgresql, found mysql://"),
        ({"url": "sqlite:////etc/secret.db"}, "a path must be under data/sources/"),
        ({"url": "sqlite:///../secret.db"}, "a path must be under data/sources/"),
        ({"url": "sqlite:///a#/../../secret.db"}, "a path must be under data/sources/"),
        ({"url": "sqlite://"}, "expected sqlite:///FILE with a file under data/sources/, found sqlite://"),
        ({"query": "select 1"}, "exactly one of query and from_table must be given"),
        ({"from_table": None}, "exactly one of query and from_table must be given"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ingest_config(sources=[{**SHOP, **settings}])
    assert expected in str(caught.value)


# Postgres

SERVER = shutil.which("initdb") and shutil.which("pg_ctl")
PASSWORD = "p%40ss word"  # as it is in the environment: nothing in it is decoded


def as_postgres(*command: str) -> None:
    """Run a command of Postgres, which refuses to run as root."""
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    subprocess.run([*prefix, *command], check=True, capture_output=True)


@pytest.fixture(scope="module")
def postgres_folder() -> Iterator[Path]:
    """A folder of the user who runs Postgres. pytest's own folders are closed to others than the user of the tests."""
    with TemporaryDirectory(prefix="bessemer-postgres-") as name:
        if os.geteuid() == 0:
            shutil.chown(name, "postgres")
        yield Path(name)


@pytest.fixture(scope="module")
def server(postgres_folder: Path) -> Iterator[str]:
    """The URL of a Postgres server of this module with a table of articles."""
    import psycopg

    folder, port = postgres_folder, free_port()
    (folder / "password").write_text(PASSWORD, encoding="utf-8")
    (folder / "password").chmod(0o644)
    data = str(folder / "data")
    as_postgres("initdb", "-D", data, "-U", "me", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    as_postgres("pg_ctl", "-D", data, "-o", options, "-w", "-l", str(folder / "log"), "start")
    try:
        with psycopg.connect(
            host="127.0.0.1", port=port, user="me", password=PASSWORD, dbname="postgres"
        ) as connection:
            connection.execute(
                "create table articles (id numeric, title text, body text, at timestamp, meta jsonb, "
                "address inet default '127.0.0.1', shares numeric[] default '{0.5, NaN}', "
                "most numeric default 'Infinity')"
            )
            connection.execute("create table numbered (id serial)")
            with connection.cursor() as cursor:
                values = "%s, %s, %s, '2026-01-02', '{\"tags\": [\"tea\"]}'"
                cursor.executemany(f"insert into articles (id, title, body, at, meta) values ({values})", ARTICLES)
        yield f"postgresql://me:${{SHOP_PASSWORD}}@127.0.0.1:{port}/postgres"
    finally:
        as_postgres("pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.mark.skipif(not SERVER, reason="needs a Postgres server's programs on the path")
class TestPostgres:
    """A server is started on a free port; it needs no network."""

    def test_rows_are_read_with_the_password_of_the_environment(
        self, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SHOP_PASSWORD", PASSWORD)
        columns = {"text": "{id}, {at}, {meta.tags.0}: {body}"}
        folder = read(tmp_path / "out", copy_sources(tmp_path), url=server, columns=columns)
        assert manifest(folder)["articles"]["read"] == 40
        assert "7, 2026-01-02T00:00:00, tea: 100 % of body 7" in {row["text"] for row in table(folder, "corpus")}
        assert not any(PASSWORD.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())

    def test_a_query_cannot_write(self, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SHOP_PASSWORD", PASSWORD)
        copied = copy_sources(tmp_path)
        query = "select setval(pg_get_serial_sequence('numbered', 'id'), 7)::text as text"
        with pytest.raises(StageError, match=r"cannot execute setval\(\) in a read-only transaction"):
            read(tmp_path / "out", copied, url=server, from_table=None, query=query, columns={})

    def test_a_wrong_password_is_in_no_message(
        self, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copied = copy_sources(tmp_path)
        monkeypatch.setenv("SHOP_PASSWORD", "wrong secret")
        with pytest.raises(StageError, match=r"postgresql://me:\$\{SHOP_PASSWORD\}@.* could not be read") as caught:
            read(tmp_path / "out", copied, url=server)
        assert "wrong secret" not in str(caught.value)
        monkeypatch.delenv("SHOP_PASSWORD")
        with pytest.raises(StageError, match="the environment variable SHOP_PASSWORD in `url` is not set; set it"):
            read(tmp_path / "other", copied, url=server)
