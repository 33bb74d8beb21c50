"""Rankings from other tools: pairs of Hugging Face data sets, exports of Argilla and Label Studio, one row a person."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common import draw
from tasks.common.sources import annotations, kinds, rows
from tasks.common.sources.importers import Layout
from tasks.common.sources.reading import Reading
from tasks.common.stage import StageError
from tasks.common.validation import checks
from tests.data_fixtures import (
    FACTS,
    copy_sources,
    ingest_config,
    ingest_into,
    manifest,
    refusals,
    table,
    validate_config,
)

ASKED = {"role": "user", "content": "What color is the sky?"}
BLUE, GREEN = ({"role": "assistant", "content": f"It is {color}."} for color in ("blue", "green"))
TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What color is the sky?\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be brief."}
WHOLE = ["user:What color is the sky?"]
LONGER = ["user:Hi", "assistant:Hello.", "user:What color is the sky?"]


def source(form: str, path: str, kind: str = "rankings") -> dict[str, Any]:
    return {**FACTS, "name": "mine", "path": path, "format": form, "table": kind}


def said(row: Any) -> list[str]:
    return [f"{turn['role']}:{turn['content']}" for turn in row]


PAIRS: list[tuple[dict[str, Any], list[str]]] = [
    ({"prompt": ASKED["content"], "chosen": BLUE["content"], "rejected": GREEN["content"]}, WHOLE),
    ({"prompt": [ASKED], "chosen": [BLUE], "rejected": [GREEN]}, WHOLE),
    ({"prompt": ASKED["content"], "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN], "score": 5}, WHOLE),
    ({"prompt": [ASKED], "chosen": BLUE["content"], "rejected": [GREEN]}, WHOLE),
    ({"chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]}, WHOLE),
    ({"chosen": [SYSTEM, ASKED, BLUE], "rejected": [SYSTEM, ASKED, GREEN]}, ["system:Be brief.", *WHOLE]),
    ({"chosen": f"{TALK} It is blue.", "rejected": f"{TALK} It is green."}, LONGER),
    ({"prompt": TALK, "chosen": " It is blue.", "rejected": " It is green."}, LONGER),
    ({"prompt": [ASKED], "chosen": "It is blue.", "rejected": "It is blue."}, WHOLE),
    ({"chosen": [ASKED, BLUE], "rejected": [ASKED, BLUE]}, WHOLE),
]


@pytest.mark.parametrize(("row", "asked"), PAIRS)
def test_a_pair_is_read_with_its_prompt_wherever_it_stands(row: dict[str, Any], asked: list[str]) -> None:
    found = Layout("preference", "rankings").convert(row)
    assert said(found["prompt"]) == asked
    assert found["responses"][0].strip() == "It is blue."
    assert found["ranks"] == [1, 2]


NO_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Hello"}, "chosen, rejected missing; expected chosen, rejected, and prompt unless they hold it"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "no prompt: expected a column prompt"),
    ({"chosen": [ASKED, BLUE, ASKED, BLUE], "rejected": [ASKED, GREEN]}, "differ in more than one reply"),
    ({"chosen": [ASKED, BLUE, ASKED], "rejected": [ASKED, BLUE]}, "chosen ends with a turn of the user; expected the"),
    ({"chosen": f"{TALK} ", "rejected": f"{TALK} It is green."}, "an empty answer"),
    ({"prompt": "Hello", "chosen": 5, "rejected": "b"}, "chosen must be a list of messages, found 5"),
    ({"prompt": [{"role": "tool", "content": "4"}], "chosen": "a", "rejected": "b"}, "a tool’s turn cannot be told"),
]


@pytest.mark.parametrize(("row", "told"), NO_PAIRS)
def test_what_is_no_pair_is_refused(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        Layout("preference", "rankings").convert(row)
    assert told in str(caught.value)


# Argilla

FIELDS = {"prompt": "Tell a joke.", "response1": "Knock.", "response2": "A duck.", "response3": "Two ducks."}
ORDER = ["response2", "response1", "response3"]


def answered(value: Any, **more: Any) -> dict[str, Any]:
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
BY_ARGILLA: list[tuple[dict[str, Any], dict[str, int]]] = [
    (answered(ORDER), {"A duck.": 1, "Knock.": 2, "Two ducks.": 3}),
    (answered(TIES, status="submitted"), {"Knock.": 1, "Two ducks.": 1, "A duck.": 3}),
    (answered("response2"), {"A duck.": 1, "Knock.": 2, "Two ducks.": 2}),
    (FLAT, {"A duck.": 1, "Knock.": 2, "Two ducks.": 3}),
    (FIRST_VERSION, {"A duck.": 1, "Knock.": 2, "Two ducks.": 2}),
    (COLUMNS, {"A duck.": 1, "Knock.": 2, "Two ducks.": 3}),
]


def converted(form: str, record: dict[str, Any]) -> Any:
    ((_, answer),) = annotations.spread(form, [("row 1", record)])
    return Layout(form, "rankings").convert(answer)


@pytest.mark.parametrize(("record", "ranks"), BY_ARGILLA)
def test_an_answer_in_argilla_is_a_ranking_by_its_user(record: dict[str, Any], ranks: dict[str, int]) -> None:
    found = converted("argilla", record)
    assert dict(zip(found["responses"], found["ranks"], strict=True)) == ranks
    assert (found["prompt"], found["annotator"]) == ("Tell a joke.", "u-1")


def test_people_whose_names_were_taken_away_keep_their_answers() -> None:
    """Two of them disagree; each answered both questions."""
    flat = {name: value for name, value in FLAT.items() if "." not in name}
    flat |= {"preference.responses": [ORDER, ORDER[::-1]], "why.responses": ["shorter", "funnier"]}
    (_, first), (_, second) = annotations.spread("argilla", [("row 1", flat)])
    assert (first["annotator"], first["answers"]) == (None, {"preference": ORDER, "why": "shorter"})
    assert (second["annotator"], second["answers"]) == (None, {"preference": ORDER[::-1], "why": "funnier"})


def test_the_context_and_a_chat_are_what_was_asked() -> None:
    record = answered(ORDER)
    record["fields"] = {**FIELDS, "context": "A pub."}
    assert converted("argilla", record)["prompt"] == "Tell a joke.\nA pub."
    record["fields"] = {**{name: FIELDS[name] for name in ORDER}, "chat": [ASKED]}
    assert converted("argilla", record)["prompt"] == [ASKED]


NOT_RANKED: list[tuple[dict[str, Any], str]] = [
    ({**answered(ORDER), "responses": {}}, "nobody has answered this record"),
    ({"anything": 5}, "nobody has answered this record"),
    (answered(ORDER, status="draft"), "an answer that is draft, not submitted"),
    (answered(ORDER, status="discarded"), "an answer that is discarded, not submitted"),
    (answered(["reply-1", "reply-2"]), "expected one question whose options are called like fields with responses"),
    (answered(5), "found 0 (none); questions: preference; fields: prompt, response1"),
    (answered(["response1", "reply-2"]), "reply-2 without a text or a rank; fields: prompt"),
    (answered([{"value": "response1", "rank": None}]), "response1 without a text or a rank"),
]


@pytest.mark.parametrize(("record", "told"), NOT_RANKED)
def test_what_argilla_exports_besides_is_refused(record: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        converted("argilla", record)
    assert told in str(caught.value)


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


BY_LABEL_STUDIO: list[tuple[dict[str, Any], dict[str, int]]] = [
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


@pytest.mark.parametrize(("row", "ranks"), BY_LABEL_STUDIO)
def test_an_annotation_in_label_studio_is_a_ranking_by_its_annotator(
    row: dict[str, Any], ranks: dict[str, int]
) -> None:
    found = converted("label_studio", row)
    assert dict(zip(found["responses"], found["ranks"], strict=True)) == ranks
    assert (found["prompt"], found["annotator"]) == ("Tell a joke.", 7)


def test_an_annotator_may_be_told_with_all_that_is_known_of_them() -> None:
    row = task(PAIR, "pairwise", {"selected": "left"}, completed_by={"id": 7, "email": "a@example.org"})
    assert converted("label_studio", row)["annotator"] == 7


NOT_ANNOTATED: list[tuple[dict[str, Any], str]] = [
    ({**task(PAIR, "pairwise", {}), "annotations": []}, "nobody has annotated this task"),
    ({"prompt": "Hi", "answer1": "a", "pw": "left"}, "data, annotations missing; expected a task of the export JSON"),
    (task(PAIR, "pairwise", {"selected": "left"}, was_cancelled=True), "an annotation that was skipped"),
    (task(PAIR, "choices", {"choices": ["a"]}), "expected one result of the type pairwise or ranker, found choices"),
    (task(PAIR, "pairwise", {"selected": None}), "expected left or right to be selected, found None"),
    (task({"prompt": "Hi", "one": "a", "two": "b"}, "pairwise", {"selected": "left"}), "cannot tell which texts were"),
    (task({"text1": "a", "text2": "b"}, "pairwise", {"selected": "left"}), "cannot tell the prompt among nothing"),
    (
        task({"prompt": "Hi", "items": ITEMS}, "ranker", {"ranker": {"good": ["a"], "_": ["b"]}}),
        "buckets (good, _) are",
    ),
    (task({"prompt": "Hi", "items": ITEMS}, "ranker", {"ranker": ["a", "z"]}), "no list in data holds the ids a, z"),
]


@pytest.mark.parametrize(("row", "told"), NOT_ANNOTATED)
def test_what_label_studio_exports_besides_is_refused(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        converted("label_studio", row)
    assert told in str(caught.value)


def mangled(value: Any, junk: Any) -> Iterator[Any]:
    """Yield a value with junk in its place, then in the place of each of its parts."""
    yield junk
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for other in mangled(part, junk):
            yield {**value, key: other} if isinstance(value, dict) else [*value[:key], other, *value[key + 1 :]]


SOUND = [
    *(("preference", row) for row, _ in PAIRS),
    *(("argilla", row) for row, _ in BY_ARGILLA),
    *(("label_studio", row) for row, _ in BY_LABEL_STUDIO),
]


@pytest.mark.parametrize("junk", [None, 5, "x", "", [], {}, [[1]], [{}], {"a": [1]}, [None, 5, "response1"]])
def test_nothing_in_a_row_stops_the_run(junk: Any) -> None:
    """Whatever stands anywhere in a row, it is taken or refused, and never another error."""
    for form, sound in SOUND:
        for row in mangled(sound, junk):
            found = annotations.spread(form, [("row 1", row)]) if form in annotations.ANSWERS else [("row 1", row)]
            for _, one in found:
                reading = Reading("mine", "MIT")
                with suppress(ValueError):
                    rows.add("rankings", Layout(form, "rankings").convert(kinds._decoded(one)), reading)
                assert all(
                    isinstance(text, str) for kept in reading.rows.get("rankings", []) for text in kept["responses"]
                )


# Through the stage


@pytest.mark.parametrize("form", ["array", "lines"])
def test_each_annotation_is_a_row_used_or_refused_with_its_place(tmp_path: Path, form: str) -> None:
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
    found = table(folder, "rankings")
    people = {draw.short_id("annotator", "mine", str(person)) for person in (7, 8)}
    assert {row["annotator"] for row in found} == people
    assert sorted(row["ranks"] for row in found) == [[1, 2], [2, 1]]
    assert len({row["split"] for row in found}) == 1
    places = {"array": ("item 1 (line 1)", "item 2 (line 1)"), "lines": ("line 1", "line 2")}[form]
    assert [item["reason"] for item in refusals(folder)] == [
        f"mine.json, {places[0]}, answer 3: an annotation that was skipped",
        f"mine.json, {places[1]}: nobody has annotated this task",
    ]
    assert (manifest(folder)["mine"]["read"], manifest(folder)["mine"]["used"]) == (4, 2)


def test_names_of_annotators_stay_out_of_the_table(tmp_path: Path) -> None:
    """The same name in another source is another person, as far as anybody knows."""
    copied = copy_sources(tmp_path)
    row = {"prompt": "Tell a joke.", "responses": ["Knock.", "A duck."], "scores": [-10, 8], "scale": [-10, 10]}
    people = [{**row, "annotator": name} for name in ("ann@example.org", "ben@example.org")]
    (copied / "mine.jsonl").write_text("\n".join(map(json.dumps, people)), encoding="utf-8")
    sources = [{**source("jsonl", "mine.jsonl"), "name": name} for name in ("one", "other")]
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, *sources])
    found = table(folder, "rankings")
    assert len({row["annotator"] for row in found}) == 4
    assert all(row["scores"] == [[-10.0], [8.0]] and row["annotators"] == 1 for row in found)
    assert not any(b"example.org" in path.read_bytes() for path in (folder / "rankings").iterdir())


BAD = [
    ({"annotator": 5.5}, "annotator must be a name or a number, found 5.5"),
    ({"annotator": "ann", "annotators": 3}, "annotator names one person, but 3 judged; give each a row"),
    (
        {"annotator": "ann", "ranks": None, "scores": [[1, 2], [3]], "scale": [1, 5]},
        "annotator names one person, but 2",
    ),
]


@pytest.mark.parametrize(("change", "told"), BAD)
def test_an_annotator_is_one_person(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    copied = copy_sources(tmp_path)
    row = {"prompt": "Tell a joke.", "responses": ["Knock.", "A duck."], "ranks": [1, 2]}
    (copied / "mine.jsonl").write_text("\n".join(map(json.dumps, [row, {**row, **change}])), encoding="utf-8")
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, source("jsonl", "mine.jsonl")])
    (refused,) = refusals(folder)
    assert told in refused["reason"]


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
    assert (row["responses"], row["ranks"], said(row["prompt"])) == (
        ["A duck.", "Knock."],
        [1, 2],
        ["user:Tell a joke."],
    )
    with pytest.raises(ValidationError, match="columns must say where rejected of table rankings is found"):
        ingest_config(sources=[{**mine, "columns": {"chosen": "good"}}])


def test_a_format_of_rankings_is_not_for_chats() -> None:
    with pytest.raises(ValidationError, match="the format argilla is for the table rankings"):
        ingest_config(sources=[source("argilla", "mine.json", "instructions")])


def test_a_file_without_any_ranking_stops_the_run(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(StageError, match=r"none of the 2 rows of mine\.json is a row of rankings; item 1"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, source("argilla", "mine.json")])


def test_every_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    """Each with the format of its section: the first three as they are, then the importers'."""
    told = (Path(__file__).parents[1] / "docs/rankings.md").read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", told, re.DOTALL)
    forms = ["jsonl", "jsonl", "preference", "preference", "argilla", "label_studio"]
    counts = []
    for number, (form, example) in enumerate(zip(forms, examples, strict=True)):
        copied = copy_sources(tmp_path / str(number))
        (copied / "mine.json").write_text(example, encoding="utf-8")
        folder = ingest_into(tmp_path / str(number) / "out", copied, sources=[FACTS, source(form, "mine.json")])
        assert refusals(folder) == []
        found = table(folder, "rankings")
        assert checks.judge("rankings", found, validate_config(), set())[1] == [None] * len(found)
        counts.append(len(found))
    assert counts == [1, 2, 1, 2, 1, 2]
