"""Rankings of other tools: preference pairs of Hugging Face data sets, exports of Argilla and Label Studio."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common import stable_hash
from tasks.common.harness.job import StageError
from tasks.ingest import annotations, row_loading, rows
from tasks.ingest.importers import Layout
from tasks.ingest.inspection import inspect
from tasks.ingest.reading import Reading
from tasks.ingest.row_loading import RowOptions
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

ASKED = {"role": "user", "content": "What color is the sky?"}
BLUE, GREEN = ({"role": "assistant", "content": f"It is {color}."} for color in ("blue", "green"))
TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What color is the sky?\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = ["user:What color is the sky?"]
LONG_PROMPT = ["user:Hi", "assistant:Hello.", "user:What color is the sky?"]


def source(form: str, path: str, kind: str = "rankings") -> dict[str, Any]:
    return {**FACTS, "name": "mine", "path": path, "format": form, "table": kind}


def turns_of(row: Any) -> list[str]:
    return [f"{turn['role']}:{turn['content']}" for turn in row]


MESSAGES = {"conversation_a": [ASKED, BLUE], "conversation_b": [ASKED, GREEN]}
FIRST = {"answer": "It", "rank": 1}
RANKED: list[tuple[dict[str, Any], list[int]]] = [
    ({"prompt": TALK, "answers": [{"answer": "Blue", "rank": 2.0}, {"answer": "Green", "rank": 1.0}]}, [2, 1]),
    (
        {"instruction": "What?", "completions": [
            {"model": "m", "response": "It", "overall_score": score} for score in (4, 7.5, 4)
        ]},
        [2, 1, 2],
    ),
    ({**MESSAGES, "winner": "model_b"}, [1, 2]),
    ({**MESSAGES, "winner": "tie (bothbad)"}, [1, 1]),
    ({"prompt": "What?", "response_0": "It is blue.", "response_1": "It is green.", "better_response_id": 0}, [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "ranks"), RANKED)
def test_ranked_answers_are_read_as_public_data_sets_have_them(
    tmp_path: Path, row: dict[str, Any], ranks: list[int]
) -> None:
    """Nectar, UltraFeedback, LMSYS Arena and PKU-SafeRLHF; of two answers the better one comes first."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = inspect(tmp_path / "rows.jsonl")
    assert found.formats == {"answers (jsonl)": 1}
    [ranking] = found.first_rows
    assert ranking["ranks"] == ranks
    assert ranking["prompt"][-1]["role"] == "user"
    if row.get("winner") == "model_b":
        assert ranking["responses"] == ["It is green.", "It is blue."]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "What?", "answers": [{"answer": "It", "rank": 1}]}, "two or more answers with a rank or a score"),
        (
            {"prompt": "What?", "answers": [{"answer": "It", "rank": 1}, {"answer": "No", "rank": None}]},
            "answer 2 has n",
        ),
        (
            {"prompt": "What?", "answers": [{"answer": "It", "rank": 1}, {"answer": None, "rank": 2}]},
            "text of answer 2",
        ),
        ({**MESSAGES, "winner": "neither"}, "winner must be one of a, model_a"),
    ],
)
def test_answers_without_an_order_are_rejected(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = inspect(tmp_path / "rows.jsonl")
    assert (found.rows_read, found.rows_rejected) == (1, 1)
    assert reason in found.problems[0]


def test_thumbs_of_single_replies_are_explained(tmp_path: Path) -> None:
    row = {"prompt": "What?", "completion": "It", "label": False}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    [problem] = inspect(tmp_path / "rows.jsonl", RowOptions(table="rankings")).problems
    assert "label judges each reply alone, thumbs up or down. Rankings need two or more replies" in problem


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "question": ASKED["content"], "chosen": BLUE["content"], "rejected": GREEN["content"]},
        {"system": "Be brief.", "Prompt": ASKED["content"], "Chosen": BLUE["content"], "Rejected ": GREEN["content"]},
        {"system": "Be brief.", "question": "Hi", "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
    ],
)
def test_pairs_keep_their_system_message_and_a_prompt_of_another_name(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    [ranking] = inspect(tmp_path / "rows.jsonl").first_rows
    assert turns_of(ranking["prompt"]) == ["system:Be brief.", *PROMPT]
    assert ranking["responses"] == [BLUE["content"], GREEN["content"]]


PAIRS: list[tuple[dict[str, Any], list[str]]] = [
    ({"prompt": ASKED["content"], "chosen": BLUE["content"], "rejected": GREEN["content"]}, PROMPT),
    ({"prompt": [ASKED], "chosen": [BLUE], "rejected": [GREEN]}, PROMPT),
    ({"prompt": ASKED["content"], "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN], "score": 5}, PROMPT),
    ({"prompt": [ASKED], "chosen": BLUE["content"], "rejected": [GREEN]}, PROMPT),
    ({"chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]}, PROMPT),
    ({"chosen": [SYSTEM, ASKED, BLUE], "rejected": [SYSTEM, ASKED, GREEN]}, ["system:Be brief.", *PROMPT]),
    ({"chosen": f"{TALK} It is blue.", "rejected": f"{TALK} It is green."}, LONG_PROMPT),
    ({"prompt": TALK, "chosen": " It is blue.", "rejected": " It is green."}, LONG_PROMPT),
    ({"prompt": [ASKED], "chosen": "It is blue.", "rejected": "It is blue."}, PROMPT),
    ({"chosen": [ASKED, BLUE], "rejected": [ASKED, BLUE]}, PROMPT),
]


@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_a_pair_is_converted_with_its_prompt(row: dict[str, Any], prompt: list[str]) -> None:
    converted = Layout("preference", "rankings").convert(row)
    assert turns_of(converted["prompt"]) == prompt
    assert converted["responses"][0].strip() == "It is blue."
    assert converted["ranks"] == [1, 2]


INVALID_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Hello"}, "chosen, rejected missing; expected chosen, rejected, and prompt unless they contain it"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "no prompt: expected a column prompt"),
    ({"chosen": [ASKED, BLUE, ASKED, BLUE], "rejected": [ASKED, GREEN]}, "differ in more than one reply"),
    ({"chosen": [ASKED, BLUE, ASKED], "rejected": [ASKED, BLUE]}, "chosen ends with a turn of the user; expected the"),
    ({"chosen": f"{TALK} ", "rejected": f"{TALK} It is green."}, "an empty answer"),
    ({"prompt": "Hello", "chosen": 5, "rejected": "b"}, "chosen must be a list of messages, found 5"),
    (
        {"prompt": [{"role": "tool", "content": "4"}], "chosen": "a", "rejected": "b"},
        "a tool’s turn cannot be represented",
    ),
]


@pytest.mark.parametrize(("row", "expected"), INVALID_PAIRS)
def test_a_row_that_is_not_a_pair_is_rejected(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        Layout("preference", "rankings").convert(row)
    assert expected in str(caught.value)


EMPTY_REJECTED: list[dict[str, Any]] = [
    {"prompt": "Hello", "chosen": "Hi.", "rejected": ""},
    {"prompt": "Hello", "chosen": "Hi.", "rejected": [{"role": "assistant", "content": ""}]},
    {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi.", "rejected": "\n\nHuman: Hello\n\nAssistant:"},
]


@pytest.mark.parametrize("row", EMPTY_REJECTED)
def test_a_rejected_reply_may_be_empty(row: dict[str, Any]) -> None:
    assert Layout("preference", "rankings").convert(row)["responses"] == ["Hi.", ""]


def test_an_empty_response_may_be_ranked_last() -> None:
    record = argilla_record(["response1", "response2"])
    record["fields"] = {"prompt": "Tell a joke.", "response1": "Knock.", "response2": ""}
    assert convert("argilla", record)["responses"] == ["Knock.", ""]
    pair = task({**PAIR, "answer2": ""}, "pairwise", {"selected": "left"})
    assert convert("label_studio", pair)["responses"] == ["Knock.", ""]


# Argilla

FIELDS = {"prompt": "Tell a joke.", "response1": "Knock.", "response2": "A duck.", "response3": "Two ducks."}
ORDER = ["response2", "response1", "response3"]


def argilla_record(value: Any, **more: Any) -> dict[str, Any]:
    answer = {"value": value, "user_id": "u-1", **more}
    return {"id": "1", "fields": FIELDS, "metadata": {}, "suggestions": {}, "responses": {"preference": [answer]}}


FLAT = {**FIELDS, "id": "1", "preference.responses": [ORDER], "preference.responses.users": ["u-1"],
        "preference.responses.status": ["submitted"]}  # fmt: skip
FIRST_VERSION = {
    **FIELDS,
    "preference": [{"user_id": "u-1", "status": "submitted", "value": {"rank": [1, 2, 2], "value": ORDER}}],
}
ROTATED = {"rank": [2, 1, 3], "value": ["response1", "response2", "response3"]}
COLUMNS = {**FIELDS, "preference": {"user_id": ["u-1"], "status": ["submitted"], "value": [ROTATED]}}
TIES = [{"value": "response1", "rank": 1}, {"value": "response3", "rank": 1}, {"value": "response2", "rank": 3}]
ARGILLA_RECORDS: list[tuple[dict[str, Any], dict[str, int]]] = [
    (argilla_record(ORDER), {"A duck.": 1, "Knock.": 2, "Two ducks.": 3}),
    (argilla_record(TIES, status="submitted"), {"Knock.": 1, "Two ducks.": 1, "A duck.": 3}),
    (argilla_record("response2"), {"A duck.": 1, "Knock.": 2, "Two ducks.": 2}),
    (FLAT, {"A duck.": 1, "Knock.": 2, "Two ducks.": 3}),
    (FIRST_VERSION, {"A duck.": 1, "Knock.": 2, "Two ducks.": 2}),
    (COLUMNS, {"A duck.": 1, "Knock.": 2, "Two ducks.": 3}),
]


def convert(form: str, record: dict[str, Any]) -> Any:
    ((_, answer),) = annotations.expand_answers(form, [("row 1", record)], dict)
    return Layout(form, "rankings").convert(answer)


@pytest.mark.parametrize(("record", "ranks"), ARGILLA_RECORDS)
def test_an_answer_in_argilla_is_a_ranking_by_its_user(record: dict[str, Any], ranks: dict[str, int]) -> None:
    converted = convert("argilla", record)
    assert dict(zip(converted["responses"], converted["ranks"], strict=True)) == ranks
    assert (converted["prompt"], converted["annotator"]) == ("Tell a joke.", "u-1")


def test_unnamed_annotators_keep_their_answers() -> None:
    """Two annotators disagree; each answered both questions."""
    flat = {name: value for name, value in FLAT.items() if "." not in name}
    flat |= {"preference.responses": [ORDER, ORDER[::-1]], "why.responses": ["shorter", "funnier"]}
    (_, first), (_, second) = annotations.expand_answers("argilla", [("row 1", flat)], dict)
    assert (first["annotator"], first["answers"]) == (None, {"preference": ORDER, "why": "shorter"})
    assert (second["annotator"], second["answers"]) == (None, {"preference": ORDER[::-1], "why": "funnier"})


def test_context_and_chat_are_part_of_the_prompt() -> None:
    record = argilla_record(ORDER)
    record["fields"] = {**FIELDS, "context": "A pub."}
    assert convert("argilla", record)["prompt"] == "Tell a joke.\nA pub."
    record["fields"] = {**{name: FIELDS[name] for name in ORDER}, "chat": [ASKED]}
    assert convert("argilla", record)["prompt"] == [ASKED]


INVALID_RECORDS: list[tuple[dict[str, Any], str]] = [
    ({**argilla_record(ORDER), "responses": {}}, "no answer to this record"),
    ({"anything": 5}, "no answer to this record"),
    (argilla_record(ORDER, status="draft"), "an answer with status draft; expected submitted"),
    (argilla_record(ORDER, status="discarded"), "an answer with status discarded; expected submitted"),
    (
        argilla_record(["reply-1", "reply-2"]),
        "expected one question whose options are the names of fields with responses",
    ),
    (argilla_record(5), "found 0 (none); questions: preference; fields: prompt, response1"),
    (argilla_record(["response1", "reply-2"]), "reply-2 without a text or a rank; fields: prompt"),
    (argilla_record([{"value": "response1", "rank": None}]), "response1 without a text or a rank"),
]


@pytest.mark.parametrize(("record", "expected"), INVALID_RECORDS)
def test_an_argilla_record_without_a_ranking_is_rejected(record: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        convert("argilla", record)
    assert expected in str(caught.value)


# Label Studio

PAIR = {"prompt": "Tell a joke.", "answer1": "Knock.", "answer2": "A duck."}
ITEMS = [
    {"id": "a", "title": "A", "body": "Knock."},
    {"id": "b", "title": "B", "body": "A duck."},
    {"id": 3, "title": "C"},
]


def task(data: Any, kind: str, value: Any, **more: Any) -> dict[str, Any]:
    result = {"id": "x", "from_name": "c", "to_name": "c", "type": kind, "value": value}
    annotation = {"id": 1, "completed_by": 7, "was_cancelled": False, "result": [result]}
    return {"id": 1, "data": data, "annotations": [{**annotation, **more}], "predictions": []}


LABEL_STUDIO_TASKS: list[tuple[dict[str, Any], dict[str, int]]] = [
    (task(PAIR, "pairwise", {"selected": "left"}), {"Knock.": 1, "A duck.": 2}),
    (task(PAIR, "pairwise", {"selected": "right"}), {"Knock.": 2, "A duck.": 1}),
    (
        task({"question": "Tell a joke.", "text_b": "A duck.", "text_a": "Knock."}, "pairwise", {"selected": "left"}),
        {"Knock.": 1, "A duck.": 2},
    ),
    (
        task({"prompt": "Tell a joke.", "items": ITEMS}, "ranker", {"ranker": {"rank": ["b", "a", "3"]}}),
        {"A duck.": 1, "Knock.": 2, "C": 3},
    ),
    (task({"prompt": "Tell a joke.", "items": ITEMS}, "ranker", {"ranker": ["b", "a"]}), {"A duck.": 1, "Knock.": 2}),
]


@pytest.mark.parametrize(("row", "ranks"), LABEL_STUDIO_TASKS)
def test_an_annotation_in_label_studio_is_a_ranking_by_its_annotator(
    row: dict[str, Any], ranks: dict[str, int]
) -> None:
    converted = convert("label_studio", row)
    assert dict(zip(converted["responses"], converted["ranks"], strict=True)) == ranks
    assert (converted["prompt"], converted["annotator"]) == ("Tell a joke.", 7)


def test_an_annotator_may_be_an_object() -> None:
    row = task(PAIR, "pairwise", {"selected": "left"}, completed_by={"id": 7, "email": "a@example.org"})
    assert convert("label_studio", row)["annotator"] == 7


INVALID_TASKS: list[tuple[dict[str, Any], str]] = [
    ({**task(PAIR, "pairwise", {}), "annotations": []}, "no annotation of this task"),
    ({"prompt": "Hi", "answer1": "a", "pw": "left"}, "data, annotations missing; expected a task of the export JSON"),
    (task(PAIR, "pairwise", {"selected": "left"}, was_cancelled=True), "a skipped annotation"),
    (task(PAIR, "choices", {"choices": ["a"]}), "expected one result of the type pairwise or ranker, found choices"),
    (task(PAIR, "pairwise", {"selected": None}), "expected left or right to be selected, found None"),
    (task({"prompt": "Hi", "one": "a", "two": "b"}, "pairwise", {"selected": "left"}), "unknown which texts were"),
    (
        task({"text1": "a", "text2": "b"}, "pairwise", {"selected": "left"}),
        "unknown which field is the prompt: found nothing",
    ),
    (
        task({"prompt": "Hi", "items": ITEMS}, "ranker", {"ranker": {"good": ["a"], "_": ["b"]}}),
        "buckets (good, _) are",
    ),
    (task({"prompt": "Hi", "items": ITEMS}, "ranker", {"ranker": ["a", "z"]}), "no list in data contains the ids a, z"),
]


@pytest.mark.parametrize(("row", "expected"), INVALID_TASKS)
def test_a_label_studio_task_without_a_ranking_is_rejected(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        convert("label_studio", row)
    assert expected in str(caught.value)


def mangle(value: Any, junk: Any) -> Iterator[Any]:
    """Yield the value replaced by junk, then the value with each of its parts replaced."""
    yield junk
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for other in mangle(part, junk):
            yield {**value, key: other} if isinstance(value, dict) else [*value[:key], other, *value[key + 1 :]]


VALID_ROWS = [
    *(("preference", row) for row, _ in PAIRS),
    *(("argilla", row) for row, _ in ARGILLA_RECORDS),
    *(("label_studio", row) for row, _ in LABEL_STUDIO_TASKS),
]


@pytest.mark.parametrize("junk", [None, 5, "x", "", [], {}, [[1]], [{}], {"a": [1]}, [None, 5, "response1"]])
def test_junk_in_a_row_does_not_stop_the_run(junk: Any) -> None:
    """A row with any value anywhere is used or rejected, without another error."""
    for form, valid in VALID_ROWS:
        for row in mangle(valid, junk):
            texts = (
                annotations.expand_answers(form, [("row 1", row)], row_loading._decode)
                if form in annotations.ANSWER_SPLITTERS
                else [("row 1", row)]
            )
            for _, one in texts:
                found: list[dict[str, Any]] = []
                reading = Reading("mine", "MIT", rows={"rankings": found})
                with suppress(ValueError):
                    rows.add_row("rankings", Layout(form, "rankings").convert(row_loading._decode(one)), reading)
                assert all(isinstance(text, str) for ranking in found for text in ranking["responses"])


# Through the stage


@pytest.mark.parametrize("form", ["array", "lines"])
def test_each_annotation_is_used_or_rejected_with_its_position(tmp_path: Path, form: str) -> None:
    copied = copy_sources(tmp_path)
    left, right, skipped = (
        task(PAIR, "pairwise", {"selected": side}, completed_by=person, was_cancelled=person == 9)["annotations"][0]
        for side, person in (("left", 7), ("right", 8), ("left", 9))
    )
    tasks = [
        {**task(PAIR, "pairwise", {}), "annotations": [left, right, skipped]},
        {"id": 2, "data": PAIR, "annotations": []},
    ]
    text = json.dumps(tasks) if form == "array" else "\n".join(map(json.dumps, tasks))
    (copied / "mine.json").write_text(text, encoding="utf-8")
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, source("label_studio", "mine.json")])
    rows = table(folder, "rankings")
    annotators = {stable_hash.short_id("annotator", "mine", str(person)) for person in (7, 8)}
    assert {row["annotator"] for row in rows} == annotators
    assert sorted(row["ranks"] for row in rows) == [[1, 2], [2, 1]]
    assert len({row["split"] for row in rows}) == 1
    positions = {"array": ("item 1", "item 2"), "lines": ("line 1", "line 2")}[form]
    assert [item["reason"] for item in rejections(folder)] == [
        f"mine.json, {positions[0]}, answer 3: a skipped annotation",
        f"mine.json, {positions[1]}: no annotation of this task",
    ]
    assert (manifest(folder)["mine"]["read"], manifest(folder)["mine"]["used"]) == (4, 2)


def test_annotator_names_are_not_in_the_table(tmp_path: Path) -> None:
    """The same name in another source gets another pseudonym."""
    copied = copy_sources(tmp_path)
    row = {"prompt": "Tell a joke.", "responses": ["Knock.", "A duck."], "scores": [-10, 8], "scale": [-10, 10]}
    people = [{**row, "annotator": name} for name in ("ann@example.org", "ben@example.org")]
    (copied / "mine.jsonl").write_text("\n".join(map(json.dumps, people)), encoding="utf-8")
    sources = [{**source("jsonl", "mine.jsonl"), "name": name} for name in ("one", "other")]
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, *sources])
    rows = table(folder, "rankings")
    assert len({row["annotator"] for row in rows}) == 4
    assert all(row["scores"] == [[-10.0], [8.0]] and row["annotators"] == 1 for row in rows)
    assert not any(b"example.org" in path.read_bytes() for path in (folder / "rankings").iterdir())


INVALID_ANNOTATORS = [
    ({"annotator": 5.5}, "annotator must be a name or a number, found 5.5"),
    ({"annotator": "ann", "annotators": 3}, "annotator names one person, but 3 judged; give each a row"),
    (
        {"annotator": "ann", "ranks": None, "scores": [[1, 2], [3]], "scale": [1, 5]},
        "annotator names one person, but 2",
    ),
]


@pytest.mark.parametrize(("change", "expected"), INVALID_ANNOTATORS)
def test_an_annotator_is_one_person(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    copied = copy_sources(tmp_path)
    row = {"prompt": "Tell a joke.", "responses": ["Knock.", "A duck."], "ranks": [1, 2]}
    (copied / "mine.jsonl").write_text("\n".join(map(json.dumps, [row, {**row, **change}])), encoding="utf-8")
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, source("jsonl", "mine.jsonl")])
    (rejected,) = rejections(folder)
    assert expected in rejected["reason"]


def test_a_dataset_of_pairs_names_its_columns(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "pairs.jsonl").write_text(
        json.dumps({"question": "Tell a joke.", "good": "A duck.", "bad": "Knock."}) + "\n", encoding="utf-8"
    )
    mine = {
        "name": "mine", "kind": "dataset", "group": None, "licence": "MIT", "path": "json", "config": None,
        "data_files": ["pairs.jsonl"], "split": "train", "revision": None, "streaming": True, "limit": None,
        "table": "rankings", "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
    }  # fmt: skip
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, mine])
    (row,) = table(folder, "rankings")
    assert (row["responses"], row["ranks"], turns_of(row["prompt"])) == (
        ["A duck.", "Knock."],
        [1, 2],
        ["user:Tell a joke."],
    )
    with pytest.raises(
        StageError, match="source mine: the columns question, good, bad, chosen are no known form of rows"
    ):
        ingest_into(tmp_path / "other", copied, sources=[FACTS, {**mine, "columns": {"chosen": "good"}}])


def test_a_ranking_format_for_chats_is_rejected() -> None:
    with pytest.raises(ValidationError, match="the format argilla is for the table rankings"):
        ingest_config(sources=[source("argilla", "mine.json", "instructions")])


def test_a_file_without_any_ranking_stops_the_run(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(StageError, match=r"none of the 2 rows of mine\.json is a row of rankings; item 1"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, source("argilla", "mine.json")])


def test_every_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    """Each example is read with the format of its section."""
    guide = (Path(__file__).parents[1] / "docs/guides/rankings.md").read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)
    forms = ["jsonl", "jsonl", "preference", "preference", "argilla", "label_studio"]
    counts = []
    for number, (form, example) in enumerate(zip(forms, examples, strict=True)):
        copied = copy_sources(tmp_path / str(number))
        (copied / "mine.json").write_text(example, encoding="utf-8")
        folder = ingest_into(tmp_path / str(number) / "out", copied, sources=[FACTS, source(form, "mine.json")])
        assert rejections(folder) == []
        rows = table(folder, "rankings")
        assert checks.check_rows("rankings", rows, validate_config(), set())[1] == [None] * len(rows)
        counts.append(len(rows))
    assert counts == [1, 2, 1, 2, 1, 2]
