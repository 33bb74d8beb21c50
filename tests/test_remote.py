"""Files on object storage: downloaded from an S3 server and verified by their hash."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tasks.common.harness.job import StageError
from tasks.ingest import remote
from tests.data_fixtures import FACTS, copy_sources, ingest_config, ingest_into, manifest, rejections, table
from tests.servers import free_port, serving

TEXTS = [f"Page {number} is about something else than the others." for number in range(40)]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty bucket on an S3 server of this module."""
    import fsspec

    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key",
                    "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with serving("moto.server", "-H", "127.0.0.1", "-p", str(port), package=None, port=port, log=log):
            files = fsspec.filesystem("s3", skip_instance_cache=True)
            files.mkdir("texts")
            yield "s3://texts"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test its own cache."""
    monkeypatch.chdir(tmp_path)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Return the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def put(url: str, content: bytes) -> dict[str, str]:
    """Write a file to a URL and return its settings."""
    import fsspec

    with fsspec.open(url, "wb") as file:
        file.write(content)
    return {"url": url, "sha256": hashlib.sha256(content).hexdigest()}


def source(*files: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Return the settings of a remote source of Parquet files whose texts are in the column `content`."""
    common = {"name": "pages", "kind": "remote", "group": "web", "licence": "CC0-1.0", "files": list(files)}
    return {**common, "format": "parquet", "table": "corpus", "columns": {"text": "content"}, "limit": None, **changes}


def pages(folder: Path) -> list[str]:
    """Return the texts that came from the remote source, in the order of TEXTS."""
    rows = [row for row in table(folder, "corpus") if row["source"] == "pages"]
    assert {row["group"] for row in rows} <= {"web"}
    return sorted((row["text"] for row in rows), key=TEXTS.index)


def test_parquet_on_object_storage_is_read_and_named_in_the_manifest(bucket: str, tmp_path: Path) -> None:
    """Several files of one source, their text in a column of another name; an invalid row is rejected with the URL."""
    rows: list[dict[str, Any]] = [{"content": text, "more": number} for number, text in enumerate(TEXTS)]
    files = [put(f"{bucket}/part-{start}.parquet", parquet(rows[start : start + 20])) for start in (0, 20)]
    files.append(put(f"{bucket}/odd.parquet", parquet([{"content": None}, {"content": TEXTS[0]}])))
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(*files)])
    assert pages(folder) == TEXTS
    entry = manifest(folder)["pages"]
    assert entry["files"] == {file["url"]: file["sha256"] for file in files}
    assert (entry["read"], entry["used"], entry["rejected"]) == (42, 40, 2)
    assert [row["reason"] for row in rejections(folder)] == [
        f"{bucket}/odd.parquet, row 1: text missing; expected text", "duplicate of an earlier row"
    ]  # fmt: skip


@pytest.mark.parametrize("storage", ["s3", "file"])
@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_other_formats_and_file_systems_are_read_the_same(bucket: str, tmp_path: Path, storage: str, form: str) -> None:
    """JSON lines and text, on S3 and on another file system of fsspec."""
    content = "\n\n".join(TEXTS) if form == "txt" else "\n".join(json.dumps({"content": text}) for text in TEXTS)
    root = bucket if storage == "s3" else f"file://{tmp_path}"
    file = put(f"{root}/pages.{form}", content.encode())
    changes = {"format": form, "columns": {} if form == "txt" else {"text": "content"}}
    assert (
        pages(ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(file, **changes)])) == TEXTS
    )


@pytest.mark.parametrize("form", ["array", "parquet"])
def test_conversations_of_other_tools_are_read_from_object_storage(bucket: str, tmp_path: Path, form: str) -> None:
    """The content determines the format: a file in the cache has no name."""
    chats: list[dict[str, Any]] = [{"instruction": f"Say {text}", "output": text} for text in TEXTS[:2]]
    chats.append({"instruction": "Say nothing.", "output": ""})
    content = json.dumps(chats).encode() if form == "array" else parquet(chats)
    file = put(f"{bucket}/chats.{form}", content)
    changes: dict[str, Any] = {"format": "alpaca", "table": "instructions", "group": None, "columns": {}}
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(file, **changes)])
    rows = [row for row in table(folder, "instructions") if row["source"] == "pages"]
    assert sorted(row["messages"][-1]["content"] for row in rows) == sorted(TEXTS[:2])
    position = {"array": "item 3", "parquet": "row 3"}[form]
    assert [row["reason"] for row in rejections(folder)] == [f"{file['url']}, {position}: an empty answer"]


def test_character_limit_skips_later_files(bucket: str, tmp_path: Path) -> None:
    """Files beyond the limit are not downloaded."""
    first = put(f"{bucket}/first.parquet", parquet([{"content": text} for text in TEXTS]))
    absent = {"url": f"{bucket}/absent.parquet", "sha256": "0" * 64}
    limit = sum(map(len, TEXTS[:5]))
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(first, absent, limit=limit)])
    assert pages(folder) == TEXTS[:5]
    assert manifest(folder)["pages"]["read"] == 5


def test_a_file_with_a_wrong_hash_is_rejected_unread(bucket: str, tmp_path: Path) -> None:
    """If the file in the bucket changed, the run stops with both hashes, and the cache stays empty."""
    pinned = put(f"{bucket}/page.parquet", parquet([{"content": TEXTS[0]}]))
    file = put(f"{bucket}/page.parquet", parquet([{"content": TEXTS[1]}]))
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(pinned)])
    assert f"Expected sha256 {pinned['sha256']}, found {file['sha256']}" in str(caught.value)
    assert list(remote.CACHE.iterdir()) == []


def test_a_cached_file_is_verified_again(bucket: str, tmp_path: Path) -> None:
    """A second run needs no network; a changed copy is rejected."""
    import fsspec

    file = put(f"{bucket}/once.parquet", parquet([{"content": TEXTS[0]}]))
    path = remote.fetch("pages", file["url"], file["sha256"])
    with fsspec.open(file["url"]) as stream:
        stream.fs.rm("texts/once.parquet")
    assert remote.fetch("pages", file["url"], file["sha256"]) == path
    path.write_bytes(b"other")
    with pytest.raises(StageError, match=r"has the wrong hash.* It came from the cache: remove"):
        remote.fetch("pages", file["url"], file["sha256"])


def test_a_missing_file_is_reported(bucket: str) -> None:
    """The message names the source, the URL and what to check."""
    with pytest.raises(StageError, match=r"source pages: s3://texts/nothing could not be read .*check the address"):
        remote.fetch("pages", f"{bucket}/nothing", "0" * 64)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"files": []}, "at least 1 item"),
        ({"files": [{"url": "s3://a/b"}]}, "sha256"),
        ({"files": [{"url": "pages.parquet", "sha256": "0" * 64}]}, "expected a URL with a scheme"),
        ({"files": [{"url": "magic://a/b", "sha256": "0" * 64}]}, "fsspec knows no scheme 'magic'"),
        ({"format": "openai", "table": "instructions", "group": None}, "unknown text; expected some of messages"),
        ({"columns": {"text": "{title"}}, "columns.text: the template '{title' is not valid"),
        ({"columns": {"text": "{}"}}, "columns.text: the template '{}' must contain names of fields in braces"),
        ({"encoding": "klingon"}, "expected an encoding of text, such as windows-1252 or shift_jis; found klingon"),
        ({"table": "facts", "columns": {}, "limit": 5}, "limit counts characters of prose"),
    ],
)
def test_invalid_settings_are_rejected(changes: dict[str, Any], expected: str) -> None:
    """Above all a file without a hash, because all training data must be pinned."""
    with pytest.raises(ValidationError) as caught:
        ingest_config(sources=[FACTS, source({"url": "s3://a/b", "sha256": "0" * 64}, **changes)])
    assert expected in str(caught.value)
