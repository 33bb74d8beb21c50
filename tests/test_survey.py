"""What the sources provide and what is wrong with them, all at once and before any is read."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks.common.harness.job import StageError
from tasks.ingest import survey as survey_module
from tasks.ingest.row_loading import OpenedRows, RowOptions, open_rows
from tasks.ingest.source_files import SourceFile
from tasks.ingest.source_settings import Remote
from tasks.ingest.survey import ALL_TABLES, possible_tables, survey
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
        {"facts"}, {"corpus"}, {"ratings"}, {"instructions"}, set(ALL_TABLES), {"corpus"}, {"corpus", "rankings"}
    ]  # fmt: skip
    assert not any(item.problems for item in found)


@pytest.mark.parametrize(
    ("settings", "tables"),
    [
        ({"columns": {"messages": "body.turns"}}, ["instructions"]),
        ({"columns": {"chosen": "good", "rejected": "bad"}}, ["rankings"]),
        ({"columns": {"value": "v"}}, ["facts"]),
        ({"format": "argilla"}, ["rankings"]),
        ({"format": "alpaca"}, ["instructions", "rankings"]),
        ({"format": "alpaca", "columns": {"output": "reply"}}, ["instructions"]),
        ({"format": "pdf"}, ["corpus"]),
        ({"format": "jsonl"}, ALL_TABLES),
    ],
    ids=str,
)
def test_settings_of_a_remote_source_rule_tables_out(settings: dict[str, Any], tables: Sequence[str]) -> None:
    [source] = ingest_config(sources=[{**REMOTE, **settings}]).sources
    assert isinstance(source, Remote)
    assert possible_tables(source) == set(tables)


def test_local_files_of_a_data_set_and_a_folder_of_rankings_are_looked_into(sources: Path) -> None:
    (sources / "pairs.json").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}', encoding="utf-8")
    (sources / "people").mkdir()
    listed = [{**HUB, "data_files": ["pairs.json"]}, {"kind": "rankings", "path": "people"}]
    pairs, people = survey(ingest_config(sources=listed).sources, sources)
    assert pairs.tables == {"rankings"}
    assert not people.tables
    (sources / "people/a.parquet").touch()
    assert survey(ingest_config(sources=listed).sources, sources)[1].tables == {"rankings"}


def test_few_files_of_a_large_folder_are_opened(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_counted(file: SourceFile, options: RowOptions) -> OpenedRows:
        opened.append(file.label)
        return open_rows(file, options)

    monkeypatch.setattr(survey_module, "open_rows", open_counted)
    (sources / "many").mkdir()
    for number in range(1000):
        (sources / f"many/{number:04}.md").write_text("Text.", encoding="utf-8")
    [found] = survey(ingest_config(sources=[{"kind": "files", "path": "many"}]).sources, sources)
    assert found.tables == {"corpus"}
    assert len(opened) == 20
    assert opened[-1] > "many/0900.md"


def test_all_problems_are_reported_at_once(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", sources, sources=[FACTS, *(source for source, _ in WRONG)])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(WRONG)
    for line, (_, expected) in zip(lines, WRONG, strict=True):
        assert re.match(expected, line), line
