"""`columns` of a source: names, paths into nested fields, and templates, for every kind of file and format."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common.harness.job import StageError
from tasks.ingest import layouts
from tasks.ingest.columns import MISSING, compile_columns, lookup
from tests.data_fixtures import copy_sources, ingest_config, ingest_into, manifest, rejections, table

ROW = {
    "id": 7,
    "title": "Tea",
    "meta": {"body": [{"text": "Green."}, {"text": "White."}], "a.b": 1},
    "a.b": 2,
    "none": None,
}
NO_FACTS: dict[str, Any] = {"wordings": None, "names": None, "relations": []}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("title", "Tea"), ("meta.body.1.text", "White."), ("a.b", 2), ("meta.a.b", 1), ("none", None),
        ("meta.body.2.text", MISSING), ("meta.body.x", MISSING), ("title.x", MISSING), ("absent", MISSING),
        ("none.x", MISSING), ("meta.body.0", {"text": "Green."}),
    ],
)  # fmt: skip
def test_a_path_leads_into_nested_fields(path: str, value: Any) -> None:
    assert lookup(ROW, path) == value


def test_a_path_leads_into_json_in_a_cell() -> None:
    assert lookup({"meta": '{"body": [{"text": "Green."}]}'}, "meta.body.0.text") == "Green."
    assert lookup({"meta": "{broken"}, "meta.body") is MISSING


def test_a_template_is_filled_with_texts_and_numbers() -> None:
    get = compile_columns({"text": "{title} {{{id}}}\n{meta.body.0.text} {at}"})
    assert get({**ROW, "at": datetime.date(2026, 1, 2)})["text"] == "Tea {7}\nGreen. 2026-01-02"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{absent}", "absent missing, which the template of text needs"),
        ("{none}", "none is null, which the template of text needs"),
        ("{meta}", "meta must be text, a time or a number below 2\\^53 in the template of text, found {'body'"),
        ("{big}", "big must be text, a time or a number below 2\\^53 in the template of text, found 1e\\+20"),
    ],
)
def test_a_field_that_a_template_lacks_is_a_reason(template: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        compile_columns({"text": template})({**ROW, "big": 1e20})


def test_only_a_required_column_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"meta\.x missing, which `columns` names for text; found id, title, meta"):
        compile_columns({"text": "meta.x"}, frozenset({"text"}))(ROW)
    assert compile_columns({"system": "meta.x"}, frozenset({"text"}))(ROW)["system"] is None


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"txet": "body"}, "columns: unknown txet; expected some of"),
        ({"text": "{title!r}"}, "the template '{title!r}' must contain names of fields in braces, such as {title}"),
        ({"text": "{title:>9}"}, "must contain names of fields in braces"),
        ({"text": "title}"}, "is not valid (Single '}' encountered in format string); {{ and }} are braces"),
    ],
)
def test_columns_that_cannot_be_read_are_settings_errors(columns: dict[str, str], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ingest_config(sources=[{"kind": "files", "path": "a.csv", "columns": columns}])
    assert expected in str(caught.value)


def read(tmp_path: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    copied = copy_sources(tmp_path)
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), copied / name)
    elif name.endswith(".csv"):
        import csv

        with (copied / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            cells = [[value if isinstance(value, str) else json.dumps(value) for value in row.values()] for row in rows]
            writer.writerows([[*rows[0]], *cells])
    else:
        (copied / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ingest_into(tmp_path / "out", copied, **NO_FACTS, sources=[{"kind": "files", "path": name, **settings}])


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
CHATS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"talk": {"turns": TURNS}}, {"messages": "talk.turns"}),
    ({"talk": {"turns": SAID}}, {"conversations": "talk.turns"}),
    ({"ask": {"q": "Hi"}, "reply": "Hello!"}, {"instruction": "ask.q", "output": "reply"}),
    ({"who": "Hi", "more": "", "reply": "Hello!"}, {"instruction": "{who}{more}", "output": "{reply}"}),
    ({"conversations": TURNS}, {}),
    ({"messages": SAID}, {}),
    ({"prompt": "Hi", "completion": "Hello!"}, {}),
    ({"messages": TURNS}, {}),
]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(("row", "columns"), CHATS)
def test_conversations_are_found_in_any_columns(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], form: str
) -> None:
    folder = read(tmp_path, f"mine.{form}", [row], columns=columns)
    assert [item["messages"] for item in table(folder, "instructions")] == [TURNS]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_pairs_take_a_prompt_from_a_template(tmp_path: Path, form: str) -> None:
    rows = [{"topic": "tea", "chosen": "Yes.", "rejected": ""}, {"topic": "", "chosen": "Yes.", "rejected": "No."}]
    folder = read(tmp_path, f"mine.{form}", rows, columns={"prompt": "Do you like {topic}?"})
    assert sorted((row["prompt"][0]["content"], *row["responses"]) for row in table(folder, "rankings")) == [
        ("Do you like ?", "Yes.", "No."), ("Do you like tea?", "Yes.", "")
    ]  # fmt: skip


def test_rankings_in_a_csv_file_are_json_in_cells(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2], "annotators": 3, "annotator": ""}
    ]
    (row,) = table(read(tmp_path, "mine.csv", rows), "rankings")
    assert (row["responses"], row["ranks"], row["annotators"], row["annotator"]) == (["a", "b"], [1, 2], 3, None)


def test_a_row_without_a_mapped_field_is_rejected(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"meta": {"body": "Text."}}, {"meta": {}}, {"other": 1}]
    folder = read(tmp_path, "mine.jsonl", rows, columns={"text": "meta.body"})
    assert [row["text"] for row in table(folder, "corpus")] == ["Text."]
    assert [row["reason"] for row in rejections(folder)] == [
        "mine.jsonl, line 2: meta.body missing, which `columns` names for text; found meta",
        "mine.jsonl, line 3: meta.body missing, which `columns` names for text; found other",
    ]
    assert (manifest(folder)["mine"]["read"], manifest(folder)["mine"]["used"]) == (3, 1)


DETECTED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": TURNS, "prompt": "Hi", "text": "x"}, "instructions", "columns"),
    ({"conversations": SAID, "id": 1}, "instructions", "sharegpt"),
    ({"conversations": SAID, "chosen": {}, "rejected": {}}, "rankings", "sharegpt"),
    ({"instruction": "a", "input": "", "output": "b"}, "instructions", "alpaca"),
    ({"instruction": "a", "chosen": "b", "rejected": "c"}, "rankings", "alpaca"),
    ({"prompt": "a", "chosen": TURNS, "rejected": TURNS, "messages": TURNS}, "rankings", "preference"),
    ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "rankings", "openai"),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}, "rankings", "columns"),
    ({"id": 1, "fields": {}, "responses": {}}, "rankings", "argilla"),
    ({"prompt": "a", "r1": "b", "r2": "c", "best.responses": ["r1"]}, "rankings", "argilla"),
    ({"id": 1, "data": {}, "annotations": []}, "rankings", "label_studio"),
    ({"kind": "a", "entity": "b", "relation": "c", "value": "d"}, "facts", "columns"),
    ({"text": "a", "ratings": "1 2"}, "ratings", "columns"),
    ({"question": "a", "context": "b", "answer": "c"}, "instructions", "alpaca"),
    ({"text": "a", "label": 1}, "corpus", "columns"),
]


@pytest.mark.parametrize(("row", "name", "form"), DETECTED)
def test_table_and_format_are_found_by_the_columns(row: dict[str, Any], name: str, form: str) -> None:
    found = layouts.detect(row, None, None, ())
    assert found is not None
    assert (found.table, found.format) == (name, form)


def test_a_stated_table_decides_between_readings() -> None:
    row = {"prompt": "a", "chosen": TURNS, "rejected": TURNS, "messages": TURNS, "text": "b"}
    assert [getattr(layouts.detect(row, name, None, ()), "format", None) for name in ("rankings", "instructions")] == [
        "preference", "columns"
    ]  # fmt: skip
    assert layouts.detect({"turns": TURNS}, None, None, ()) is None
    assert layouts.detect({"prompt": "a", "completion": "b", "label": False}, None, None, ()) is None
    assert layouts.detect({"turns": TURNS}, "instructions", None, ()) is None


def test_unknown_columns_are_listed_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        read(tmp_path, "mine.jsonl", [{"utterance": "Hi", "speaker": 1}])
    assert str(caught.value) == (
        "source mine: mine.jsonl: the columns utterance, speaker are no known form of rows of a table; say with "
        "`table` what the rows are (corpus, instructions, rankings) and with `columns` which of these are read, such "
        "as columns: {text: ...}, {instruction: ..., output: ...} or {prompt: ..., chosen: ..., rejected: ...}."
    )
    with pytest.raises(StageError, match=r"mine\.csv lacks columns of corpus\. Expected text; found body\."):
        read(tmp_path / "again", "mine.csv", [{"body": "Hi"}], table="corpus")


def test_a_column_that_was_taken_for_another_is_noted(tmp_path: Path) -> None:
    folder = read(tmp_path, "mine.jsonl", [{"query": "Hi", "response": "Hello!"}])
    note = "mine.jsonl: read as alpaca, where instruction is query, output is response"
    assert manifest(folder)["mine"]["notes"] == [note]
