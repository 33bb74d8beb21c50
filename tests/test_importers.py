"""Importers of other tools' files: rows are converted, or rejected with file, position and reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common.harness.job import StageError
from tasks.ingest import formats, json_values
from tasks.ingest.importers import Layout
from tasks.ingest.source_files import SourceFile, UnreadableFile
from tasks.validate import checks
from tests.data_fixtures import (
    FACTS,
    copy_sources,
    ingest_config,
    ingest_into,
    manifest,
    rejections,
    table,
    validate_config,
)

ALPACA = {"instruction": "Translate to French.", "input": "Good day", "output": "Bonjour"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hello to you!"}]}
OPENAI = {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello to you!"}]}
ROWS = {"alpaca": ALPACA, "sharegpt": SHAREGPT, "openai": OPENAI}


def turns_of(row: Any) -> list[str]:
    """Return a chat in short: `user:Hello!`."""
    return [f"{turn['role']}:{turn['content']}" for turn in row]


CHATS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("alpaca", ALPACA, ["user:Translate to French.\nGood day", "assistant:Bonjour"]),
    ("alpaca", {"instruction": "Say hello.", "output": "Hello"}, ["user:Say hello.", "assistant:Hello"]),
    ("alpaca", {"instruction": "Spell.", "input": 0, "output": "zero"}, ["user:Spell.\n0", "assistant:zero"]),
    ("alpaca", {"instruction": "Negate.", "input": False, "output": "true"}, ["user:Negate.\nfalse", "assistant:true"]),
    ("alpaca", {"instruction": "Fine.", "output": 0}, ["user:Fine.", "assistant:0"]),  # a label
    ("alpaca", {"instruction": "Fine.", "output": True}, ["user:Fine.", "assistant:true"]),
    (
        "alpaca",
        {**ALPACA, "input": "", "system": "Be brief.", "history": [["Hi", "Hello"], ["Who?", "Me"]]},
        ["system:Be brief.", "user:Hi", "assistant:Hello", "user:Who?", "assistant:Me", "user:Translate to French.",
         "assistant:Bonjour"],
    ),
    ("sharegpt", SHAREGPT, ["user:Hello!", "assistant:Hello to you!"]),
    ("sharegpt", {**SHAREGPT, "system": "Be kind.", "tools": ""}, ["system:Be kind.", "user:Hello!",
                                                                  "assistant:Hello to you!"]),
    ("openai", OPENAI, ["user:Hello!", "assistant:Hello to you!"]),
    (
        "openai",
        {"messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]},
            {"role": "assistant", "content": "Hello to you!", "weight": 1},
        ]},
        ["system:Be kind.", "user:Hello!", "assistant:Hello to you!"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "turns"), CHATS)
def test_a_chat_is_converted_to_messages(name: str, row: dict[str, Any], turns: list[str]) -> None:
    assert turns_of(Layout(name, "instructions").convert(row)["messages"]) == turns


PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("alpaca", {"instruction": "Hello!", "chosen": "Hello to you!", "rejected": "What?"}),
    (
        "sharegpt",
        {
            "conversations": SHAREGPT["conversations"][:1],
            "chosen": {"from": "gpt", "value": "Hello to you!"},
            "rejected": {"from": "gpt", "value": "What?"},
        },
    ),
    (
        "openai",
        {
            "input": {"messages": OPENAI["messages"][:1]},
            "preferred_output": OPENAI["messages"][1:],
            "non_preferred_output": [{"role": "assistant", "content": "What?"}],
        },
    ),
]


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_a_preference_is_a_ranking_of_two(name: str, row: dict[str, Any]) -> None:
    converted = Layout(name, "rankings").convert(row)
    assert turns_of(converted["prompt"]) == ["user:Hello!"]
    assert (converted["responses"], converted["ranks"]) == (["Hello to you!", "What?"], [1, 2])


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_only_the_rejected_reply_of_a_pair_may_be_empty(name: str, row: dict[str, Any]) -> None:
    text = json.dumps(row)
    converted = Layout(name, "rankings").convert(json.loads(text.replace("What?", "")))
    assert converted["responses"] == ["Hello to you!", ""]
    with pytest.raises(ValueError, match="an empty answer"):
        Layout(name, "rankings").convert(json.loads(text.replace("Hello to you!", "")))


THOUGHT = "Three and four make seven."
ASKED = {"role": "user", "content": "3 + 4?"}
THOUGHTFUL: list[tuple[str, dict[str, Any]]] = [
    *(
        (
            "openai",
            {"messages": [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7.", **more}]},
        )
        for more in ({"reasoning_content": THOUGHT}, {"thinking": f"{THOUGHT}\n"}, {"reasoning": THOUGHT})
    ),
    (
        "openai",
        {
            "messages": [
                {"role": "user", "content": "3 + 4?"},
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": "7."}],
                },
            ]
        },
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "3 + 4?"}, {"from": "gpt", "value": "7.", "thinking": THOUGHT}]},
    ),
    ("alpaca", {"instruction": "3 + 4?", "output": "7.", "reasoning_content": THOUGHT}),
]


@pytest.mark.parametrize(("name", "row"), THOUGHTFUL)
def test_reasoning_is_never_dropped_silently(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"set `reasoning: keep` for this source .* or `reasoning: drop` to leave it out"
    ):
        Layout(name, "instructions").convert(row)
    kept = Layout(name, "instructions", reasoning="keep").convert(row)
    assert turns_of(kept["messages"]) == ["user:3 + 4?", f"assistant:<think>\n{THOUGHT}\n</think>\n\n7."]
    dropped = Layout(name, "instructions", reasoning="drop").convert(row)
    assert turns_of(dropped["messages"]) == ["user:3 + 4?", "assistant:7."]


@pytest.mark.parametrize("form", [None, "openai"])
def test_a_source_says_whether_reasoning_is_kept(tmp_path: Path, form: str | None) -> None:
    """Also of rows with the columns of the table."""
    copied = copy_sources(tmp_path)
    rows = [THOUGHTFUL[0][1], {**OPENAI, "answer": "Hello"}]
    (copied / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    mine = {**FACTS, "name": "mine", "path": "mine.jsonl", "format": form, "table": None}
    rejecting = ingest_into(tmp_path / "out", copied, sources=[FACTS, mine])
    assert [row["source"] for row in rejections(rejecting)] == ["mine"]
    keeping = ingest_into(tmp_path / "other", copied, sources=[FACTS, {**mine, "reasoning": "keep"}])
    chats = [row for row in table(keeping, "instructions") if row["source"] == "mine"]
    assert any(row["messages"][-1]["content"].startswith("<think>") for row in chats)
    assert {row["answer"] for row in chats} == ({None} if form else {None, "Hello"})


def reply(**message: Any) -> dict[str, Any]:
    return {"messages": [OPENAI["messages"][0], {"role": "assistant", **message}]}


REJECTED: list[tuple[str, str, dict[str, Any], str]] = [
    ("alpaca", "instructions", {"instruction": "Hello"}, "output missing; expected instruction, output"),
    ("alpaca", "instructions", {**ALPACA, "output": " "}, "an empty answer"),
    ("alpaca", "instructions", {**ALPACA, "instruction": "", "input": ""}, "an empty turn of the user"),
    ("alpaca", "instructions", {**ALPACA, "output": [5]}, "content must be text, found [5]"),
    ("alpaca", "instructions", {**ALPACA, "history": ["Hi"]}, "history must be pairs"),
    ("alpaca", "instructions", {**ALPACA, "images": ["a.png"]}, "images cannot be represented in a text chat"),
    ("alpaca", "rankings", ALPACA, "chosen, rejected missing; expected instruction, chosen, rejected"),
    ("sharegpt", "instructions", {"conversation": []}, "conversations missing; expected conversations"),
    ("sharegpt", "instructions", {"conversations": []}, "conversations must be a list of messages, found []"),
    ("sharegpt", "instructions", {**SHAREGPT, "tools": "[{}]"}, "tools cannot be represented"),
    (
        "sharegpt",
        "instructions",
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "a tool's turn (function_call) cannot be represented",
    ),
    ("sharegpt", "instructions", {"conversations": [{"from": "bard", "value": "Hi"}]}, "expected a role of human, gpt"),
    ("sharegpt", "instructions", {"conversations": [{"role": "user"}]}, "each message needs from and value"),
    ("sharegpt", "instructions", {"conversations": [{"from": "gpt", "value": ""}]}, "an empty answer"),
    ("openai", "instructions", {}, "messages missing; expected messages"),
    ("openai", "instructions", reply(content=None, tool_calls=[{}]), "tool_calls cannot be represented"),
    ("openai", "instructions", reply(content=""), "an empty answer"),
    ("openai", "instructions", reply(content="Hi", weight=0), "a reply of weight 0"),
    (
        "openai",
        "instructions",
        reply(content=[{"type": "image_url"}]),
        "only parts of type text can be represented in a text chat, found an image (type image_url); remove the row",
    ),
    (
        "openai",
        "instructions",
        reply(content=["a"]),
        "only parts of type text can be represented in a text chat, fo",
    ),
    ("openai", "instructions", reply(content="Hi", train=False), "a reply of train: false: every reply of a chat is"),
    ("openai", "rankings", {**PAIRS[2][1], "preferred_output": OPENAI["messages"]}, "must be one message, found 2"),
    ("openai", "instructions", {"messages": [{"role": "tool", "content": "4"}]}, "a tool’s turn cannot be represented"),
    ("openai", "instructions", {"messages": [{"role": "bot", "content": "4"}]}, "expected a role of system"),
    ("openai", "rankings", {"input": {}}, "preferred_output, non_preferred_output missing; expected input"),
]


@pytest.mark.parametrize(("name", "kind", "row", "expected"), REJECTED)
def test_content_that_is_not_a_text_chat_is_rejected(name: str, kind: str, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        Layout(name, kind).convert(row)
    assert expected in str(caught.value)


def read_json(path: Path) -> list[tuple[str, Any]]:
    return list(formats.read(SourceFile(path, path.name), "json", False, None, frozenset()))


# Through the stage


def source(name: str, path: str, kind: str = "instructions") -> dict[str, Any]:
    return {**FACTS, "name": "mine", "path": path, "format": name, "table": kind}


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("form", ["array", "lines", "parquet"])
def test_rows_are_used_or_rejected_with_file_position_and_reason(tmp_path: Path, name: str, form: str) -> None:
    copied = copy_sources(tmp_path)
    text = json.dumps(ROWS[name])
    good, empty = ROWS[name], json.loads(text.replace("Bonjour", "").replace("Hello to you!", ""))
    path = copied / f"mine.{'parquet' if form == 'parquet' else 'json'}"
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([good, empty]), path)
    elif form == "array":
        path.write_text(f"[\n{json.dumps(good)},\n\n{json.dumps(empty, indent=1)}\n]\n", encoding="utf-8")
    else:
        path.write_text(f"{json.dumps(good)}\n\n\n{json.dumps(empty)}\n", encoding="utf-8")
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, source(name, path.name)])
    (rejected,) = rejections(folder)
    position = {"array": "item 2", "lines": "line 4", "parquet": "row 2"}[form]
    assert rejected["reason"] == f"{path.name}, {position}: an empty answer"
    (row,) = [row for row in table(folder, "instructions") if row["source"] == "mine"]
    assert row["messages"][-1]["role"] == "assistant"
    assert row["entity"] == row["messages"][0]["content"]
    assert (manifest(folder)["mine"]["read"], manifest(folder)["mine"]["used"]) == (2, 1)


def test_an_imported_chat_is_validated_like_others(tmp_path: Path) -> None:
    """`validate` rejects texts that are longer than a limit, damaged, or duplicates."""
    copied = copy_sources(tmp_path)
    invalid = ["x" * 501, "Hello\ufffd", "Hello  to you!"]
    rows = [
        SHAREGPT,
        *({"conversations": [SHAREGPT["conversations"][0], {"from": "gpt", "value": text}]} for text in invalid),
    ]
    (copied / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, source("sharegpt", "mine.json")])
    chats = [row for row in table(folder, "instructions") if row["source"] == "mine"]
    reasons = checks.check_rows("instructions", chats, validate_config(max_message_characters=500), set())[1]
    assert sorted(map(str, reasons)) == [
        "None", "a message longer than 500 characters", "damaged encoding", "duplicate of an earlier row",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction"', "after item 1, in line 3: the file ends"),
        ("[{'instruction': 'a'}]", "after item 0, in line 1: Expecting property name enclosed in double quotes"),
        ('{"a": 1}\n{"b": 2}\n', "none of the 2 rows of"),
    ],
)
def test_a_file_of_another_kind_stops_the_run(tmp_path: Path, content: str | bytes, expected: str) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError, match="source mine: ") as caught:
        ingest_into(tmp_path / "out", copied, sources=[FACTS, source("alpaca", "mine.json")])
    assert expected in str(caught.value)


@pytest.mark.parametrize("buffer_bytes", [3, 7, 64, 4096])
def test_an_array_longer_than_the_buffer_gives_all_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    """The buffer may end in a text, a number, an escape sequence, or the space between two items."""
    monkeypatch.setattr(json_values, "BUFFER_CHARACTERS", buffer_bytes)
    items = [{"text": "café, [x] \\ {y}" * 9}, 1234567, ["]", [5]], None, {}, 0.1, 10**30]
    path = tmp_path / "mine.json"
    positions = [f"item {number}" for number in range(1, 8)]
    path.write_text("\n [" + ",\n\n".join(map(json.dumps, items)) + " ]\n", encoding="utf-8")
    assert read_json(path) == list(zip(positions, items, strict=True))


@pytest.mark.parametrize(
    ("more", "rows"),
    [("[{}]", [{}]), ("\n{}\n", [{}]), (" 1", [1]), ('\n\n{"b":\n1}[] [2, 3]', [{"b": 1}, 2, 3])],
)
def test_content_after_an_array_is_read_too(tmp_path: Path, more: str, rows: list[Any]) -> None:
    path = tmp_path / "mine.json"
    path.write_text('[{"a": 1}, {"a": 2}]' + more, encoding="utf-8")
    assert [row for _, row in read_json(path)] == [{"a": 1}, {"a": 2}, *rows]


@pytest.mark.parametrize(
    "more", [",", "]", "}", "[{}", "{", '{"a"', "[" * 100_000, "\n\nnonsense"], ids=lambda text: text[:9]
)
def test_other_content_after_an_array_is_an_error_with_its_place(tmp_path: Path, more: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text('[{"a": 1},\n{"a": 2}]' + more, encoding="utf-8")
    line, item = 2 + more.count("\n"), 2 + (more == "[{}")
    with pytest.raises(UnreadableFile, match=rf"expected JSON in mine.json, .* after item {item}, in line {line}: "):
        read_json(path)


def test_a_truncated_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('[{"a": 1}, {"a": "b', encoding="utf-8")
    with pytest.raises(
        UnreadableFile, match=r"after item 1, in line 1: the file ends within a value; correct it there"
    ):
        read_json(path)


def test_an_array_nested_too_deep_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("[1, " + "[" * 100_000, encoding="utf-8")
    with pytest.raises(UnreadableFile, match=r"after item 1, in line 1: its values are nested too deep"):
        read_json(path)


def test_a_group_for_chats_is_rejected() -> None:
    """A group names documents in a mixture; conversations are not in mixtures."""
    with pytest.raises(
        ValidationError, match="`group` applies only to documents, not to instructions; set group to null"
    ):
        ingest_config(sources=[{**source("openai", "mine.json"), "group": "chats"}])


def test_a_chat_format_for_prose_is_rejected() -> None:
    with pytest.raises(ValidationError, match="the format openai is for the tables instructions and rankings"):
        ingest_config(sources=[source("openai", "mine.json", "corpus")])


# LLaMA-Factory

FACTORY = {"name": "factory", "kind": "llamafactory", "licence": "MIT", "path": "lf/dataset_info.json"}
INFO: dict[str, Any] = {
    "plain": {"file_name": "plain.json"},
    "tagged": {
        "file_name": "tagged.jsonl", "formatting": "sharegpt",
        "columns": {"messages": "talk.dialogue"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "preferred": {
        "file_name": "preferred.json", "ranking": True,
        "columns": {"prompt": "question", "chosen": "better", "rejected": "worse"},
    },
    "hub": {"hf_hub_url": "someone/chats"},
    "part": {"file_name": "plain.json", "subset": "en"},
    "odd": {"file_name": "plain.json", "columns": {"reply": "output"}},
    "form": {"file_name": "plain.json", "formatting": "chatml"},
    "list": {"file_name": "plain.json", "columns": ["instruction"]},
    "absent": {"file_name": "absent.json"},
    "outside": {"file_name": "../../secret.json"},
}  # fmt: skip


def factory(folder: Path) -> Path:
    copied = copy_sources(folder)
    (copied / "lf").mkdir()
    (folder / "secret.json").write_text("[]")
    reply = {"role": "assistant", "content": "Me.", "thinking": "I."}
    dialogue = [{"role": "user", "content": "Who?"}, reply]
    content = {
        "dataset_info.json": INFO,
        "plain.json": [ALPACA, {"instruction": "Hello"}],
        "tagged.jsonl": {"talk": {"dialogue": dialogue}},
        "preferred.json": [{"question": "Which?", "better": "This.", "worse": "That."}],
    }
    for name, value in content.items():
        (copied / "lf" / name).write_text(json.dumps(value), encoding="utf-8")
    return copied


def test_the_data_sets_named_are_read_into_their_tables(tmp_path: Path) -> None:
    chosen = {**FACTORY, "datasets": ["plain", "tagged", "preferred"], "reasoning": "keep"}
    folder = ingest_into(tmp_path / "out", factory(tmp_path), sources=[FACTS, chosen])
    chats = [row["messages"][-1]["content"] for row in table(folder, "instructions") if row["source"] == "factory"]
    assert sorted(chats) == ["<think>\nI.\n</think>\n\nMe.", "Bonjour"]
    (ranking,) = table(folder, "rankings")
    assert (ranking["responses"], ranking["ranks"]) == (["This.", "That."], [1, 2])
    (rejected,) = rejections(folder)
    assert rejected["reason"] == "plain.json, item 2: output missing; expected instruction, output"
    entry = manifest(folder)["factory"]
    assert (entry["read"], entry["used"], entry["rows"]) == (4, 3, {"corpus": 0, "instructions": 2, "rankings": 1})
    assert list(entry["files"]) == ["lf/dataset_info.json", "lf/plain.json", "lf/tagged.jsonl", "lf/preferred.json"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hub", "data set hub names hf_hub_url, which pins no bytes: put its file beside dataset_info.json"),
        ("part", "data set part: subset is not supported; expected file_name, formatting"),
        ("odd", "data set odd: unknown column or tag reply; expected one of assistant_tag,"),
        ("list", "data set list: columns and tags must map names to names, found ['instruction']"),
        ("form", "data set form: expected a formatting of alpaca, sharegpt, openai, found 'chatml'"),
        ("absent", "data set absent: expected a file_name of a file under"),
        ("outside", "data set outside: expected a file_name of a file under"),
        ("other", "has no data set other; it has plain, tagged, preferred"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_reported(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(StageError, match="source factory: ") as caught:
        ingest_into(tmp_path / "out", factory(tmp_path), sources=[FACTS, {**FACTORY, "datasets": [name]}])
    assert expected in str(caught.value)
