"""Sources: files, datasets and rankings are read as they are meant, and what is wrong with one is told by its name."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks import ingest
from tasks.common.sources import rows
from tasks.common.sources.reading import Reading
from tasks.common.stage import StageError
from tests.data_fixtures import (
    CHAT,
    FACTS,
    PEOPLE,
    RANKING,
    RATINGS,
    copy_sources,
    ingest_config,
    ingest_into,
    manifest,
    refusals,
    table,
)


@pytest.mark.parametrize(
    ("content", "change", "told"),
    [
        (None, {}, "source mine: expected a file at"),
        ("kind,entity,value\ncountry,France,Paris\n", {}, "Missing: relation"),
        ("{}\n{}\n", {"format": "jsonl"}, "none of the 2 rows of"),
        ("not parquet", {"format": "parquet"}, "source mine: expected a Parquet file at"),
        (b"tea\n\ncaf\xe9\n", {"format": "txt", "table": "corpus"}, "mine.data, found the byte 0xe9 in line 3; save"),
        ("tea".encode("utf-16"), {"format": "jsonl"}, "found UTF-16; save it as UTF-8"),
        (gzip.compress(b"{}", mtime=0), {"format": "jsonl"}, "found a gzip file; unpack it first"),
        (b"PAR1\xff", {"format": "jsonl"}, "found a Parquet file; set `format: parquet`"),
        ("\n[\n{}\n]\n", {"format": "jsonl"}, "expected an object a line in"),
        ("\n", {"format": "jsonl"}, "source mine: expected rows of facts in mine.data, found none"),
        ("kind,entity,relation,value\n" + "x" * 200_000, {}, "found something else (after line 1: field larger"),
    ],
)
def test_a_bad_file_is_told(tmp_path: Path, content: str | bytes | None, change: dict[str, str], told: str) -> None:
    copied = copy_sources(tmp_path)
    if content is not None:
        (copied / "mine.data").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", copied, sources=[{**FACTS, "name": "mine", "path": "mine.data", **change}])
    assert told in str(caught.value)


def test_what_would_not_be_read_among_rankings_is_told(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "rankings").mkdir(exist_ok=True)
    (copied / "rankings" / "mine.jsonl").write_text(f"{json.dumps(RANKING)}\n", encoding="utf-8")
    with pytest.raises(StageError, match=r"expected Parquet files alone in .*rankings, found mine\.jsonl"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, PEOPLE])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "responses": ["b", "c"]}, "exactly one of ranks and scores must be given"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1.0], [2.0]]}, "scores need the scale's two ends"),
        (
            {"prompt": [{"role": "user"}], "responses": ["b", "c"], "ranks": [1, 2]},
            "each of prompt needs role and content",
        ),
        ({**RANKING, "responses": 5}, "responses must be a list, found 5"),
        ({**RANKING, "responses": ["b", None]}, "responses must be text, found None"),
        ({**RANKING, "prompt": [{"role": "user", "content": 5}]}, "content of prompt must be text, found 5"),
        ({**RANKING, "prompt": "\ud800"}, "content of prompt holds half a character"),
        ({**RANKING, "ranks": [1.5, 2]}, "ranks must be whole numbers from 0 to 2147483647, found 1.5"),
        ({**RANKING, "ranks": [1, 10**20]}, "ranks must be whole numbers"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": 5, "scale": [1, 2]}, "scores must be a list, found 5"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1], ["2"]], "scale": [1, 2]}, "scores must be numbers"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1], [2]], "scale": 5}, "scale must be a list"),
        ({**RANKING, "annotators": "three"}, "annotators must be whole numbers"),
        ({**RANKING, "models": "a"}, "models must be a list, found 'a'"),
    ],
)
def test_a_bad_ranking_is_refused_with_its_reason(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.jsonl").write_text(f"{json.dumps(RANKING)}\n{json.dumps(row)}\n", encoding="utf-8")
    mine = {**FACTS, "name": "mine", "path": "mine.jsonl", "format": "jsonl", "table": "rankings"}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, mine])
    assert [told in refusal["reason"] for refusal in refusals(folder)] == [True]
    assert len(table(folder, "rankings")) == 1


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("instructions", {"messages": CHAT, "answer": 1}, "answer must be text, found 1"),
        ("instructions", {"messages": CHAT, "entity": 5}, "entity must be text, found 5"),
        ("instructions", {"messages": CHAT, "tone": ["plain"]}, "tone must be text, found ['plain']"),
        ("instructions", {"messages": [CHAT[0], {**CHAT[1], "content": None}]}, "content of messages must be text"),
        ("corpus", {"text": 5}, "text must be text, found 5"),
        ("corpus", {"text": "\ud800"}, "text holds half a character"),
        ("ratings", {"text": "a", "ratings": 5}, "ratings must be numbers"),
        ("ratings", {"text": "a", "ratings": [1], "prompt": 5}, "prompt must be text, found 5"),
        ("facts", {"kind": "country", "entity": "a", "relation": "capital", "value": 5}, "value must be text, found 5"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(name: str, row: dict[str, Any], told: str) -> None:
    reading = Reading("mine", "MIT", "")
    with pytest.raises(ValueError, match=re.escape(told)):
        rows.add(name, row, reading)
    assert reading == Reading("mine", "MIT", "")


def test_quotes_and_spaces_in_a_header_and_separators_in_json_are_read(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.csv").write_text(
        '"kind", entity , "relation",value\ncountry, "Peru", capital, Lima\n', encoding="utf-8"
    )
    text = "One line\u2028and \x85 another."
    (copied / "mine.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    told = {**FACTS, "name": "told", "path": "mine.csv"}
    prose = {**FACTS, "name": "told-too", "path": "mine.jsonl", "format": "jsonl", "table": "corpus"}
    found = table(ingest_into(tmp_path / "out", copied, sources=[told, prose, RATINGS]), "corpus")
    assert {"The capital of Peru is Lima.", text} <= {row["text"] for row in found}


def test_a_csv_row_with_more_cells_than_columns_is_refused(tmp_path: Path) -> None:
    """A comma in a value without quotes would else cut the value short, and nobody would know."""
    copied = copy_sources(tmp_path)
    (copied / "mine.csv").write_text(
        "kind,entity,relation,value\ncountry,Peru,capital,Lima\ncountry,Chile,capital,Santiago, the city\n",
        encoding="utf-8",
    )
    mine = {**FACTS, "name": "mine", "path": "mine.csv"}
    folder = ingest_into(tmp_path / "out", copied, sources=[mine, RATINGS])
    (refused,) = refusals(folder)
    assert refused["reason"] == (
        "mine.csv, line 3: more cells than columns, ['the city'] too many; a value with a comma needs quotes around it"
    )
    assert not any("Santiago" in row["text"] for row in table(folder, "corpus"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"kind,found,name,article,why\ncountry,caf\xe9,,,\n", "expected CSV in UTF-8"),
        (b"kind,found\ncountry,Peru\n", "expected the columns kind, found, name, article, why"),
    ],
)
def test_bad_names_are_told(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "names.csv").write_bytes(content)
    with pytest.raises(StageError, match=told):
        ingest.load_names(tmp_path / "names.csv")


DATASET = {
    "name": "hub", "kind": "dataset", "group": None, "licence": "MIT", "path": "parquet", "config": None,
    "data_files": ["hub/rows.parquet"],
    "split": "train", "revision": None, "streaming": False, "limit": None, "table": "instructions",
    "columns": {"messages": "conversation", "entity": "about"},
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["parquet", "./hub"])
def test_a_dataset_is_read_from_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, streaming: bool
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    (copied / "hub").mkdir()
    chats = [[{"role": "user", "content": f"Hello {number}!"}, CHAT[1]] for number in range(5)]
    pq.write_table(
        pa.table({"conversation": chats, "about": [f"e{number}" for number in range(5)]}), copied / "hub/rows.parquet"
    )
    files = DATASET["data_files"] if path == "parquet" else []
    source = {**DATASET, "path": path, "data_files": files, "streaming": streaming, "limit": 3}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, source])
    found = [row for row in table(folder, "instructions") if row["source"] == "hub"]
    assert sorted((row["entity"], row["messages"][0]["content"]) for row in found) == [
        ("e0", "Hello 0!"), ("e1", "Hello 1!"), ("e2", "Hello 2!")
    ]  # fmt: skip
    assert manifest(folder)["hub"]["read"] == 3


def test_a_dataset_without_a_wanted_column_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    (copied / "hub").mkdir()
    pq.write_table(pa.table({"other": ["a"]}), copied / "hub/rows.parquet")
    with pytest.raises(StageError, match=r"source hub: expected the columns about, conversation, found other"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, DATASET])
    with pytest.raises(StageError, match=r"source hub: expected .*absent\.parquet, found nothing there"):
        ingest_into(tmp_path / "out2", copied, sources=[FACTS, {**DATASET, "data_files": ["absent.parquet"]}])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("builder", "content"), [("parquet", b"no parquet"), ("json", b'{"a": 1}\n{"a": ')])
def test_a_broken_file_of_a_dataset_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str, content: bytes, streaming: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    (copied / "broken").write_bytes(content)
    source = {**DATASET, "path": builder, "data_files": ["broken"], "streaming": streaming}
    with pytest.raises(StageError, match=rf"source hub: expected the dataset {builder} .*but it could not be read"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, source])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_out_of_reach_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.chdir(tmp_path)  # the tests' surroundings keep the hub's client offline
    away = {**DATASET, "path": "someone/chats", "data_files": [], "revision": "0" * 40, "streaming": streaming}
    with pytest.raises(StageError, match=r"source hub: expected the dataset someone/chats .*but it could not be read"):
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, away])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({**DATASET, "path": "someone/chats", "data_files": []}, "needs revision"),
        ({**DATASET, "data_files": []}, "data_files belong to the builders"),
        ({**DATASET, "columns": {"entity": "about"}}, "columns must say where messages"),
        (
            {**DATASET, "columns": {"messages": "turns", "enttiy": "about"}},
            "nothing reads enttiy; what is read is answer",
        ),
        ({**FACTS, "path": "../secret.csv"}, "path must lie under data/sources/"),
        ({**DATASET, "data_files": ["../secret.parquet"]}, "path must lie under data/sources/"),
        ({**DATASET, "path": "./../secret", "data_files": []}, "path must lie under data/sources/"),
        ({**PEOPLE, "path": "/secret"}, "path must lie under data/sources/"),
        ({**FACTS, "format": "txt"}, "a txt file holds paragraphs"),
        ({**FACTS, "name": "prose"}, "statements and prose are what mixtures call documents"),
        ({**FACTS, "group": "statements"}, "statements and prose are what mixtures call documents"),
        ({**FACTS, "group": "facts"}, "could not tell whether facts is a source or a group"),
        ({**DATASET, "group": "chats"}, "a group is of documents, and instructions are none"),
        ({**FACTS, "colour": "red"}, "Extra inputs are not permitted"),
        ({**FACTS, "kind": "magic"}, "does not match any of the expected tags"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_before_anything_runs(source: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ingest_config(sources=[source])
    assert told in str(caught.value)


@pytest.mark.parametrize("key", ["wordings", "names"])
def test_wordings_and_names_lie_among_the_sources(key: str) -> None:
    with pytest.raises(ValidationError, match="path must lie under data/sources/"):
        ingest_config(**{key: "../elsewhere"})


def test_two_sources_need_two_names() -> None:
    with pytest.raises(ValidationError, match="each source needs a name of its own, unlike facts"):
        ingest_config(sources=[FACTS, FACTS])
