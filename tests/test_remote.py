"""Files on object storage: streamed from an S3 server, pinned by hash, refused where they are not what was meant."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tasks.common.sources import remote
from tasks.common.stage import StageError
from tests.data_fixtures import FACTS, copy_sources, ingest_config, ingest_into, manifest, refusals, table
from tests.servers import free_port, serving

TEXTS = [f"Page {number} tells of something else than the others." for number in range(40)]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty bucket on an S3 server of this module's own."""
    import fsspec

    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    surroundings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key",
                    "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings.items():
            patch.setenv(name, value)
        with serving("moto.server", "-H", "127.0.0.1", "-p", str(port), package=None, port=port, log=log):
            files = fsspec.filesystem("s3", skip_instance_cache=True)
            files.mkdir("texts")
            yield "s3://texts"


@pytest.fixture(autouse=True)
def folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test has a cache of its own."""
    monkeypatch.chdir(tmp_path)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Return the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def put(url: str, content: bytes) -> dict[str, str]:
    """Write a file to its address and return how settings name it."""
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
    """Several files of one source, their text in a column of another name; a bad row is refused with its address."""
    rows: list[dict[str, Any]] = [{"content": text, "more": number} for number, text in enumerate(TEXTS)]
    files = [put(f"{bucket}/part-{start}.parquet", parquet(rows[start : start + 20])) for start in (0, 20)]
    files.append(put(f"{bucket}/odd.parquet", parquet([{"content": None}, {"content": TEXTS[0]}])))
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(*files)])
    assert pages(folder) == TEXTS
    entry = manifest(folder)["pages"]
    assert entry["files"] == {file["url"]: file["sha256"] for file in files}
    assert (entry["read"], entry["used"], entry["refused"]) == (42, 40, 2)
    assert [row["reason"] for row in refusals(folder)] == [
        f"{bucket}/odd.parquet, row 1: text missing; expected text", "the same text came before"
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["s3", "file"])
@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_other_formats_and_places_are_read_the_same(bucket: str, tmp_path: Path, place: str, form: str) -> None:
    """JSON lines and text, on S3 and behind any other address that fsspec knows."""
    content = "\n\n".join(TEXTS) if form == "txt" else "\n".join(json.dumps({"content": text}) for text in TEXTS)
    root = bucket if place == "s3" else f"file://{tmp_path}"
    file = put(f"{root}/pages.{form}", content.encode())
    changes = {"format": form, "columns": {} if form == "txt" else {"text": "content"}}
    assert (
        pages(ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(file, **changes)])) == TEXTS
    )


@pytest.mark.parametrize("form", ["array", "parquet"])
def test_conversations_of_other_tools_are_read_from_object_storage(bucket: str, tmp_path: Path, form: str) -> None:
    """What a file is tells its content: in the cache it has no name."""
    chats: list[dict[str, Any]] = [{"instruction": f"Say {text}", "output": text} for text in TEXTS[:2]]
    chats.append({"instruction": "Say nothing.", "output": ""})
    content = json.dumps(chats).encode() if form == "array" else parquet(chats)
    file = put(f"{bucket}/chats.{form}", content)
    changes: dict[str, Any] = {"format": "alpaca", "table": "instructions", "group": None, "columns": {}}
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(file, **changes)])
    rows = [row for row in table(folder, "instructions") if row["source"] == "pages"]
    assert sorted(row["messages"][-1]["content"] for row in rows) == sorted(TEXTS[:2])
    place = {"array": "item 3 (line 1)", "parquet": "row 3"}[form]
    assert [row["reason"] for row in refusals(folder)] == [f"{file['url']}, {place}: an empty answer"]


def test_the_limit_counts_characters_and_leaves_later_files_alone(bucket: str, tmp_path: Path) -> None:
    """Files beyond the limit are not even fetched."""
    first = put(f"{bucket}/first.parquet", parquet([{"content": text} for text in TEXTS]))
    absent = {"url": f"{bucket}/absent.parquet", "sha256": "0" * 64}
    limit = sum(map(len, TEXTS[:5]))
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(first, absent, limit=limit)])
    assert pages(folder) == TEXTS[:5]
    assert manifest(folder)["pages"]["read"] == 5


def test_a_changed_file_is_refused_before_anything_of_it_is_read(bucket: str, tmp_path: Path) -> None:
    """Somebody wrote to the bucket: the run stops, names both hashes, and keeps nothing of it."""
    meant = put(f"{bucket}/page.parquet", parquet([{"content": TEXTS[0]}]))
    found = put(f"{bucket}/page.parquet", parquet([{"content": TEXTS[1]}]))
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source(meant)])
    assert f"Expected sha256 {meant['sha256']}, found {found['sha256']}" in str(caught.value)
    assert list(remote.CACHE.iterdir()) == []


def test_a_file_is_fetched_once_and_its_copy_is_not_trusted(bucket: str, tmp_path: Path) -> None:
    """A second run needs no network; a copy that was tampered with is refused."""
    import fsspec

    file = put(f"{bucket}/once.parquet", parquet([{"content": TEXTS[0]}]))
    path = remote.fetch("pages", file["url"], file["sha256"])
    with fsspec.open(file["url"]) as opened:
        opened.fs.rm("texts/once.parquet")
    assert remote.fetch("pages", file["url"], file["sha256"]) == path
    path.write_bytes(b"other")
    with pytest.raises(StageError, match=r"has the wrong hash.* It came from the cache: remove"):
        remote.fetch("pages", file["url"], file["sha256"])


def test_a_file_that_is_not_there_is_told(bucket: str) -> None:
    """The message names the source, the address and what to look at."""
    with pytest.raises(StageError, match=r"source pages: s3://texts/nothing could not be read .*check the address"):
        remote.fetch("pages", f"{bucket}/nothing", "0" * 64)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"files": []}, "at least 1 item"),
        ({"files": [{"url": "s3://a/b"}]}, "sha256"),
        ({"files": [{"url": "pages.parquet", "sha256": "0" * 64}]}, "an address has a scheme"),
        ({"files": [{"url": "magic://a/b", "sha256": "0" * 64}]}, "fsspec knows no scheme 'magic'"),
        ({"format": "txt"}, "a file of the format txt has no columns to name"),
        ({"format": "openai", "table": "instructions", "group": None}, "the format openai has no columns to name"),
        ({"table": "facts", "limit": 5}, "limit counts characters of prose"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], told: str) -> None:
    """Above all a file without a hash: what a run learns from must be pinned."""
    with pytest.raises(ValidationError) as caught:
        ingest_config(sources=[FACTS, source({"url": "s3://a/b", "sha256": "0" * 64}, **changes)])
    assert told in str(caught.value)
