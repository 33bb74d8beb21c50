"""Sources: files, datasets and rankings are read, and errors name the source."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common.harness.job import StageError
from tasks.ingest import fact_resolution, rows
from tasks.ingest.reading import Reading
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
    rejections,
    table,
)


@pytest.mark.parametrize(
    ("content", "change", "expected"),
    [
        (None, {}, "source mine: expected a file at"),
        ("kind,entity,value\ncountry,France,Paris\n", {}, "Missing: relation"),
        ("{}\n{}\n", {"format": "jsonl"}, "none of the 2 rows of"),
        ("not parquet", {"format": "parquet"}, "source mine: expected parquet in mine.data, found something else"),
        (
            "чай".encode("koi8-r"),
            {"format": "txt", "table": "corpus"},
            "found the byte 0xde in line 1; save it as UTF-8",
        ),
        ("tea\nth\u00e9 \u8336".encode() + b"\xff", {"format": "txt", "table": "corpus"}, "the byte 0xff in line 2"),
        (b"PAR1\xff", {"format": "jsonl"}, "expected jsonl in mine.data, found parquet; correct or remove `format`"),
        ("\n", {"format": "jsonl"}, "source mine: expected rows of facts in mine.data, found none"),
        ("", {"format": None, "table": None}, "source mine: mine.data: an empty file."),
        (b"PK\x03\x04\0", {"format": None}, "a zip file or a document of Word, Excel or PowerPoint; unpack it"),
        (b"\x80\x04\x95", {"format": "csv"}, "a pickle, which can run code; save it as Parquet or JSON lines"),
        (b"a\0\1b", {"format": None}, "mine.data: binary data of an unknown kind"),
        ('kind,entity,relation,value\n"a,b,c,d\n' + "e\n" * 9, {}, "after line 1: a quoted cell that begins there is"),
        ("kind,kind\na,b\n", {}, "expected one column of each name in line 1, found 'kind' more than once"),
    ],
)
def test_a_bad_file_is_reported(
    tmp_path: Path, content: str | bytes | None, change: dict[str, str], expected: str
) -> None:
    copied = copy_sources(tmp_path)
    if content is not None:
        (copied / "mine.data").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", copied, sources=[{**FACTS, "name": "mine", "path": "mine.data", **change}])
    assert expected in str(caught.value)


def test_a_file_of_another_format_among_rankings_is_reported(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "rankings").mkdir(exist_ok=True)
    (copied / "rankings" / "mine.jsonl").write_text(f"{json.dumps(RANKING)}\n", encoding="utf-8")
    with pytest.raises(StageError, match=r"expected only Parquet files in .*rankings, found mine\.jsonl"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, PEOPLE])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "responses": ["b", "c"]}, "exactly one of ranks and scores must be given"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1.0], [2.0]]}, "scores need the scale's two ends"),
        (
            {"prompt": [{"role": "user"}], "responses": ["b", "c"], "ranks": [1, 2]},
            "content must be text, found None",
        ),
        ({**RANKING, "responses": 5}, "responses must be a list, found 5"),
        ({**RANKING, "responses": ["b", None]}, "responses must be text, found None"),
        ({**RANKING, "prompt": [{"role": "user", "content": 5}]}, "content must be text, found 5"),
        ({**RANKING, "prompt": "\ud800"}, "content of prompt contains a lone surrogate"),
        ({**RANKING, "ranks": [1.5, 2]}, "ranks must be whole numbers from 0 to 2147483647, found 1.5"),
        ({**RANKING, "ranks": [1, 10**20]}, "ranks must be whole numbers"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": 5, "scale": [1, 2]}, "scores must be a list, found 5"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1], ["2"]], "scale": [1, 2]}, "scores must be numbers"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1], [2]], "scale": 5}, "scale must be a list"),
        ({**RANKING, "annotators": "three"}, "annotators must be whole numbers"),
        ({**RANKING, "models": "a"}, "models must be a list, found 'a'"),
    ],
)
def test_a_bad_ranking_is_rejected_with_its_reason(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.jsonl").write_text(f"{json.dumps(RANKING)}\n{json.dumps(row)}\n", encoding="utf-8")
    mine = {**FACTS, "name": "mine", "path": "mine.jsonl", "format": "jsonl", "table": "rankings"}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, mine])
    assert [expected in rejection["reason"] for rejection in rejections(folder)] == [True]
    assert len(table(folder, "rankings")) == 1


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("instructions", {"messages": CHAT, "answer": 1}, "answer must be text, found 1"),
        ("instructions", {"messages": CHAT, "entity": 5}, "entity must be text, found 5"),
        ("instructions", {"messages": CHAT, "tone": ["plain"]}, "tone must be text, found ['plain']"),
        ("instructions", {"messages": [CHAT[0], {**CHAT[1], "content": None}]}, "content of messages must be text"),
        ("corpus", {"text": 5}, "text must be text, found 5"),
        ("corpus", {"text": "\ud800"}, "text contains a lone surrogate"),
        ("ratings", {"text": "a", "ratings": 5}, "ratings must be numbers"),
        ("ratings", {"text": "a", "ratings": [1], "prompt": 5}, "prompt must be text, found 5"),
        ("facts", {"kind": "country", "entity": "a", "relation": "capital", "value": 5}, "value must be text, found 5"),
    ],
)
def test_a_value_of_a_wrong_type_is_rejected(name: str, row: dict[str, Any], expected: str) -> None:
    reading = Reading("mine", "MIT", "")
    with pytest.raises(ValueError, match=re.escape(expected)):
        rows.add_row(name, row, reading)
    assert reading == Reading("mine", "MIT", "")


def test_quotes_and_spaces_in_a_header_and_separators_in_json_are_read(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.csv").write_text(
        '"kind", entity , "relation",value\ncountry, "Peru", capital, Lima\n', encoding="utf-8"
    )
    text = "One line\u2028and \x85 another."
    (copied / "mine.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    facts = {**FACTS, "name": "quoted", "path": "mine.csv"}
    prose = {**FACTS, "name": "separators", "path": "mine.jsonl", "format": "jsonl", "table": "corpus"}
    rows = table(ingest_into(tmp_path / "out", copied, sources=[facts, prose, RATINGS]), "corpus")
    assert {"The capital of Peru is Lima.", text} <= {row["text"] for row in rows}


def test_a_csv_row_with_more_cells_than_columns_is_rejected(tmp_path: Path) -> None:
    """An unquoted comma would otherwise truncate the value silently."""
    copied = copy_sources(tmp_path)
    (copied / "mine.csv").write_text(
        "kind,entity,relation,value\ncountry,Peru,capital,Lima\ncountry,Chile,capital,Santiago, the city\n",
        encoding="utf-8",
    )
    mine = {**FACTS, "name": "mine", "path": "mine.csv"}
    folder = ingest_into(tmp_path / "out", copied, sources=[mine, RATINGS])
    (rejected,) = rejections(folder)
    assert rejected["reason"] == (
        "mine.csv, line 3: more cells than columns, ['the city'] too many; "
        "a value with the delimiter needs quotes around it"
    )
    assert not any("Santiago" in row["text"] for row in table(folder, "corpus"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"kind,found,name,article,why\ncountry,caf\xe9,,,\n", "expected CSV in UTF-8"),
        (b"kind,found\ncountry,Peru\n", "expected the columns kind, found, name, article, why"),
    ],
)
def test_bad_names_are_reported(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "names.csv").write_bytes(content)
    with pytest.raises(StageError, match=expected):
        fact_resolution.load_names(tmp_path / "names.csv")


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
    rows = [row for row in table(folder, "instructions") if row["source"] == "hub"]
    assert sorted((row["entity"], row["messages"][0]["content"]) for row in rows) == [
        ("e0", "Hello 0!"), ("e1", "Hello 1!"), ("e2", "Hello 2!")
    ]  # fmt: skip
    assert manifest(folder)["hub"]["read"] == 3


def test_a_dataset_without_a_required_column_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    (copied / "hub").mkdir()
    pq.write_table(pa.table({"other": ["a"]}), copied / "hub/rows.parquet")
    with pytest.raises(StageError, match=r"source hub: expected the columns about, conversation, found other"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, DATASET])
    with pytest.raises(StageError, match=r"source hub: expected absent\.parquet in .*, found nothing there"):
        ingest_into(tmp_path / "out2", copied, sources=[FACTS, {**DATASET, "data_files": ["absent.parquet"]}])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("builder", "content"), [("parquet", b"no parquet"), ("json", b'{"a": 1}\n{"a": ')])
def test_a_broken_file_of_a_dataset_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str, content: bytes, streaming: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    (copied / "broken").write_bytes(content)
    source = {**DATASET, "path": builder, "data_files": ["broken"], "streaming": streaming}
    with pytest.raises(StageError, match=rf"source hub: expected the dataset {builder} .*but it could not be read"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, source])


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreachable_dataset_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.chdir(tmp_path)  # the environment of the tests keeps the hub client offline
    remote = {**DATASET, "path": "someone/chats", "data_files": [], "revision": "0" * 40, "streaming": streaming}
    with pytest.raises(StageError, match=r"source hub: expected the dataset someone/chats .*but it could not be read"):
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, remote])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({**DATASET, "path": "someone/chats", "data_files": []}, "needs revision"),
        ({**DATASET, "data_files": []}, "data_files are required for the builders"),
        (
            {**DATASET, "columns": {"messages": "turns", "enttiy": "about"}},
            "columns: unknown enttiy; expected some of answer",
        ),
        ({**FACTS, "path": "../secret.csv"}, "path must be under data/sources/"),
        ({**DATASET, "data_files": ["../secret.parquet"]}, "path must be under data/sources/"),
        ({**DATASET, "path": "./../secret", "data_files": []}, "path must be under data/sources/"),
        ({**PEOPLE, "path": "/secret"}, "path must be under data/sources/"),
        ({**FACTS, "format": "txt"}, "a txt file contains documents"),
        ({**FACTS, "name": "prose"}, "prose is reserved: mixtures call documents"),
        ({**FACTS, "group": "statements"}, "statements is reserved: mixtures call documents"),
        ({**FACTS, "group": "facts"}, "facts is the name of both a source and a group"),
        ({**DATASET, "group": "chats"}, "`group` applies only to documents, not to instructions"),
        ({**FACTS, "colour": "red"}, "Extra inputs are not permitted"),
        ({**FACTS, "kind": "magic"}, "does not match any of the expected tags"),
    ],
)
def test_invalid_settings_of_a_source_are_rejected(source: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ingest_config(sources=[source])
    assert expected in str(caught.value)


@pytest.mark.parametrize("key", ["wordings", "names"])
def test_wordings_and_names_must_be_under_the_sources(key: str) -> None:
    with pytest.raises(ValidationError, match="path must be under data/sources/"):
        ingest_config(**{key: "../elsewhere"})


def test_two_sources_need_two_names() -> None:
    with pytest.raises(ValidationError, match="source names must be unique; found facts more than once"):
        ingest_config(sources=[FACTS, FACTS])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_null_column_of_a_dataset_that_turns_to_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    pq.write_table(pa.table({"text": ["a", "b"], "note": pa.nulls(2)}), copied / "one.parquet")
    pq.write_table(pa.table({"text": ["c", "d"], "note": ["x", "y"]}), copied / "two.parquet")
    files = ["one.parquet", "two.parquet"]
    source = {**DATASET, "data_files": files, "streaming": streaming, "table": "corpus", "columns": {}}
    expected = (
        r"source hub: the column note of one\.parquet, two\.parquet is null in the first 2 rows and has values after"
    )
    with pytest.raises(StageError, match=expected):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, source])
    both = {**FACTS, "name": "both", "path": "*.parquet", "format": None, "table": None}
    rows = table(ingest_into(tmp_path / "other", copied, sources=[FACTS, both]), "corpus")
    assert {row["text"] for row in rows if row["source"] == "both"} == set("abcd")


def test_columns_of_a_dataset_may_be_paths_and_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    rows = [{"talk": {"turns": CHAT}, "topic": "tea"}, {"talk": {"turns": []}, "topic": "milk"}]
    (copied / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = {"messages": "talk.turns", "entity": "{topic}!"}
    source = {**DATASET, "path": "json", "data_files": ["rows.jsonl"], "table": None, "columns": columns}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, source])
    (row,) = [row for row in table(folder, "instructions") if row["source"] == "hub"]
    assert (row["entity"], row["messages"]) == ("tea!", CHAT)
    assert [item["reason"] for item in rejections(folder)] == [
        "json, row 2: messages must be a list of messages, found []"
    ]


def test_a_conversation_of_two_sources_is_kept_once(tmp_path: Path) -> None:
    """The source that is listed first keeps it, wherever the ids are in the table."""
    copied = copy_sources(tmp_path)
    chats = [{"messages": [{"role": "user", "content": f"Hello {number}!"}, CHAT[1]]} for number in range(20)]
    for name, listed in (("b.jsonl", chats), ("a.jsonl", chats[::-1])):
        (copied / name).write_text("\n".join(map(json.dumps, listed)), encoding="utf-8")
    sources = [{"kind": "files", "path": name} for name in ("b.jsonl", "a.jsonl")]
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, *sources])
    assert Counter(row["source"] for row in table(folder, "instructions") if row["source"] != "facts") == {"b": 20}
    assert Counter((row["source"], row["reason"]) for row in rejections(folder)) == {
        ("a", "duplicate of an earlier row"): 20
    }
