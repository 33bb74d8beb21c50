"""What the sources provide and what is wrong with them, all at once and before any is read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.common.harness.job import StageError
from tasks.ingest.survey import survey
from tests.data_fixtures import FACTS, PROSE, RATINGS, SMALLTALK, copy_sources, ingest_config, ingest_into

REMOTE = {"kind": "remote", "files": [{"url": "s3://bucket/a.jsonl", "sha256": "0" * 64}]}
HUB = {"kind": "dataset", "path": "json", "data_files": ["absent.json"], "split": "train"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": "files", "path": "absent.txt"}, "source absent: expected a file at .*absent.txt, a folder with files"),
    ({"kind": "files", "path": "odd.jsonl"}, "source odd: odd.jsonl: the columns utterance are no known form of rows"),
    (
        {"kind": "files", "path": "torn.json"},
        "source torn: expected JSON in torn.json, found something else after",
    ),
    ({"kind": "files", "path": "image.txt"}, "source image: image.txt: an image; only text can be read"),
    ({"kind": "rankings", "path": "absent"}, "source absent-2: expected a folder at .*absent"),
    ({"kind": "sql", "url": "sqlite:///absent.db", "from_table": "a"}, "source a: expected an SQLite file at"),
    (HUB, "source absent-3: expected absent.json in .*, found nothing there"),
    ({"kind": "llamafactory", "path": "odd.jsonl", "datasets": ["a"]}, "source odd-2: .*odd.jsonl has no data set a"),
]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    copied = copy_sources(tmp_path)
    (copied / "odd.jsonl").write_text(json.dumps({"utterance": "Hi"}), encoding="utf-8")
    (copied / "torn.json").write_text('[{"text"', encoding="utf-8")
    (copied / "image.txt").write_bytes(b"\x89PNG")
    return copied


def test_tables_are_known_before_a_source_is_read(sources: Path) -> None:
    listed = [
        FACTS,
        PROSE,
        RATINGS,
        {**SMALLTALK, "table": None, "format": None},
        REMOTE,
        {**REMOTE, "table": "corpus"},
    ]
    (sources / "mixed").mkdir()
    (sources / "mixed/a.md").write_text("# Title", encoding="utf-8")
    (sources / "mixed/b.json").write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}]', encoding="utf-8")
    found = survey(ingest_config(sources=[*listed, {"kind": "files", "path": "mixed"}]).sources, sources)
    assert [set(item.tables) for item in found] == [
        {"facts"}, {"corpus"}, {"ratings"}, {"instructions"}, set(), {"corpus"}, {"corpus", "rankings"}
    ]  # fmt: skip
    assert not any(item.problems for item in found)


def test_all_problems_are_reported_at_once(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", sources, sources=[FACTS, *(source for source, _ in WRONG)])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(WRONG)
    for line, (_, expected) in zip(lines, WRONG, strict=True):
        assert re.match(expected, line), line
