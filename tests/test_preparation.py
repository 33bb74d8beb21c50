"""What `validate` changes in rows before it checks them: personal data outside code, and messages without an answer."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.common import tables
from tasks.common.harness.job import StageError
from tasks.validate import stage as validate
from tasks.validate.personal import Personal, mark_text, rejected_kind
from tasks.validate.preparation import Changes, prepare_row
from tests.data_fixtures import import_great_expectations, job, table

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def great_expectations() -> None:
    import_great_expectations()


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


CURATE: dict[str, Any] = {"code": ["shell"], "near_duplicates": {}, "language": {"keep": ["en"]}, "quality": {}}
PING = "Ping 8.8.8.8 and write to jane@example.org about it."


def chat(identifier: str, *turns: str, source: str = "talk", split: str = "train") -> Row:
    """Return a conversation; a turn is `role:content`."""
    messages = [{"role": turn.partition(":")[0], "content": turn.partition(":")[2]} for turn in turns]
    return {
        "id": identifier, "messages": messages, "entity": identifier, "answer": None, "tone": None, "source": source,
        "split": split,
    }  # fmt: skip


def ranking(identifier: str, responses: list[str], ranks: list[int], source: str = "talk") -> Row:
    return {
        "id": identifier, "prompt": [{"role": "user", "content": f"{identifier}?"}], "responses": responses,
        "ranks": ranks, "scores": None, "scale": None, "annotators": 1, "annotator": None, "models": [],
        "source": source, "split": "train",
    }  # fmt: skip


def document(identifier: str, text: str, source: str = "pages") -> Row:
    return {
        "id": identifier, "text": text, "names": [], "source": source, "group": None, "licence": "MIT",
        "split": "train",
    }  # fmt: skip


def run(folder: Path, rows: dict[str, list[Row]], **changes: Any) -> dict[str, Any]:
    """Validate rows with the defaults of the settings, some of them changed."""
    for name in tables.TABLES:
        tables.write(rows.get(name, []), folder / "in" / name, tables.schema(name))
    inputs = {name: folder / "in" / name for name in tables.TABLES}
    return validate.run(validate.Config.model_validate(changes), job(validate, inputs, folder / "out"))


def reasons(folder: Path, name: str) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in table(folder / "out/rejected", name)}


# Personal data and code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Run `ping 8.8.8.8`, then mail a@example.org.", "Run `ping 8.8.8.8`, then mail <EMAIL>."),
        ("```\nssh root@8.8.8.8\n```\nAsk a@example.org", "```\nssh root@8.8.8.8\n```\nAsk <EMAIL>"),
        ("~~~sh\ncurl 8.8.8.8\n~~~", "~~~sh\ncurl 8.8.8.8\n~~~"),
        ("```\nan open block of a@example.org", "```\nan open block of <EMAIL>"),
        ("git clone git@github.com:team/project.git", "git clone git@github.com:team/project.git"),
        ("Write to a@example.org: she knows.", "Write to <EMAIL>: she knows."),
    ],
)
def test_personal_data_in_code_is_left_alone(text: str, expected: str) -> None:
    assert mark_text(text, Personal(), Counter()) == expected
    rejecting = Personal(email="reject", ip="reject")
    assert (rejected_kind(text, rejecting) is None) == (text == expected)


@pytest.mark.parametrize("source", ["talk", "shell"])
def test_personal_data_of_declared_commands_is_left_alone(tmp_path: Path, source: str) -> None:
    rows = {
        "corpus": [document("d", PING, source)],
        "instructions": [chat("c", f"user:{PING}", f"assistant:{PING}", source=source)],
        "rankings": [ranking("r", [PING, "No."], [1, 2], source)],
    }
    figures = run(tmp_path, rows, curate={"code": ["shell"]})
    assert [item["rows"] for item in figures["marked"].values()] == ([0] * 3 if source == "shell" else [1] * 3)
    kept = [row for name in tables.TABLES for row in table(tmp_path / "out", name)]
    assert ("example.org" in json.dumps(kept)) == (source == "shell")


def test_marks_are_printed_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, {"corpus": [document("d", PING)], "rankings": [ranking("r", [PING, "No, a@example.org."], [1, 2])]})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "personal" in line]
    assert "1 email, 1 ip in 1 of corpus; 2 email, 1 ip in 1 of rankings (rows)" in line


# Shapes of conversations

HELLO = ("user:Hello?", "assistant:Hello to you!")


@pytest.mark.parametrize(
    ("turns", "kept", "removed"),
    [
        (HELLO, HELLO, []),
        ((*HELLO, "user:Are you there?"), HELLO, ["user"]),
        ((*HELLO, "user:Are you there?", "user:Hm?"), HELLO, ["user", "user"]),
        (("system: ", *HELLO), HELLO, ["system"]),
        (("system:Be kind.", *HELLO, "user:And?"), ("system:Be kind.", *HELLO), ["user"]),
        (("system:Be kind.",), ("system:Be kind.",), []),  # rejected by the checks
        (("user:Hello?",), ("user:Hello?",), []),
        ((*HELLO, "user:What?", "system:Hm."), (*HELLO, "user:What?", "system:Hm."), []),
    ],
)
def test_messages_without_an_answer_are_removed_and_recorded(
    turns: tuple[str, ...], kept: tuple[str, ...], removed: list[str]
) -> None:
    changes = Changes()
    prepared = prepare_row("instructions", chat("c", *turns), None, (), changes)
    assert prepared == chat("c", *kept)
    assert changes.removed == removed


def test_removed_messages_are_counted_listed_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(tmp_path, {"instructions": [chat("c", *HELLO, "user:And?"), chat("d", "user:A?", "assistant:B.")]})
    assert figures["shortened"] == {"corpus": 0, "instructions": 1, "rankings": 0}
    assert table(tmp_path / "out", "instructions")[0] == chat("c", *HELLO)
    (line,) = (tmp_path / "out/report/changed.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"table": "instructions", "id": "c", "found": {}, "removed": ["user"]}
    assert "1 rows of instructions lost a message that no answer follows" in capsys.readouterr().out
    assert "A message without an answer was removed in 1 row." in " ".join(page(tmp_path).split())


def page(folder: Path) -> str:
    return (folder / "out/report/index.html").read_text(encoding="utf-8")


# Rankings


@pytest.mark.parametrize(
    ("responses", "ranks", "kept"),
    [
        (["Yes.", ""], [1, 2], True),
        (["Yes.", " ", "No."], [1, 2, 3], True),
        (["", "Yes."], [1, 2], False),
        (["Yes.", ""], [1, 1], False),
    ],
)
def test_empty_response_may_be_any_but_the_best(
    tmp_path: Path, responses: list[str], ranks: list[int], kept: bool
) -> None:
    rows = [ranking("r", responses, ranks), ranking("s", ["A.", "B."], [1, 2])]
    run(tmp_path, {"rankings": rows}, max_rejected_share=1)
    assert reasons(tmp_path, "rankings") == ({} if kept else {"r": "an empty response is ranked best"})


def test_empty_response_of_scores_may_not_be_best(tmp_path: Path) -> None:
    scored = {**ranking("r", ["", "Yes."], [1, 2]), "ranks": None, "scores": [[3.0], [1.0]], "scale": [1.0, 5.0]}
    turned = {**scored, "id": "t", "responses": ["Yes.", ""]}
    run(tmp_path, {"rankings": [scored, turned]}, max_rejected_share=1)
    assert reasons(tmp_path, "rankings") == {"r": "an empty response is ranked best"}


# Limits that fit the data


def test_sixty_conversations_pass_with_defaults(tmp_path: Path) -> None:
    rows = [chat(str(number), f"user:What is {number}?", f"assistant:{number} is a number.") for number in range(60)]
    rows[3]["messages"][1]["content"] = " "
    run(tmp_path, {"instructions": rows})
    assert len(table(tmp_path / "out", "instructions")) == 59
    assert reasons(tmp_path, "instructions") == {"3": "an empty message"}


def test_long_documents_and_messages_pass_with_defaults(tmp_path: Path) -> None:
    text = "The river rises in the hills of the north, and that is all that we have to say. " * 2500
    rows = {"corpus": [document("d", text)], "instructions": [chat("c", "user:Tell all.", f"assistant:{text}")]}
    run(tmp_path, rows, min_rows={"corpus": 1})
    assert len(table(tmp_path / "out", "corpus")[0]["text"]) == len(text) == 200_000
    report = json.loads((tmp_path / "out/report/validation.json").read_text(encoding="utf-8"))
    assert report[0]["limits"][0] == {
        "setting": "max_text_characters", "value": None, "origin": "default",
        "found": "longest kept: 200,000 characters",
    }  # fmt: skip
    assert [limit["origin"] for limit in report[0]["limits"]] == ["default", "default", "params.yaml"]
    assert "no limit" in page(tmp_path)


def test_heldout_conversations_alone_pass(tmp_path: Path) -> None:
    run(tmp_path, {"instructions": [chat("c", *HELLO, split="heldout")]})
    assert len(table(tmp_path / "out", "instructions")) == 1


def test_conversations_of_both_splits_may_open_alike(tmp_path: Path) -> None:
    """Their entity is the opening, which is no subject; the splits were stated by the source."""
    rows = [
        {**chat(split, *HELLO, f"user:{split}?", "assistant:Yes.", split=split), "entity": "Hello?"}
        for split in ("train", "heldout")
    ]
    run(tmp_path, {"instructions": rows})
    assert len(table(tmp_path / "out", "instructions")) == 2


def test_tables_without_rows_pass_and_are_no_failure_on_the_page(tmp_path: Path) -> None:
    figures = run(tmp_path, {})
    assert figures["expectations_met"] == 0
    assert "the run stopped here" not in page(tmp_path)
    assert "✓ All 0 expectations are met." in page(tmp_path)


def test_empty_table_needs_no_rows_unless_a_limit_asks_for_them(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"table corpus has no rows, but validate\.min_rows\.corpus asks for 3"):
        run(tmp_path, {"instructions": [chat("c", *HELLO)]}, min_rows={"corpus": 3})
    assert "No row is kept of corpus; the run stopped here." in page(tmp_path)


def test_rows_rejected_by_curation_do_not_stop_the_run(tmp_path: Path) -> None:
    german = "Der Ausschuss der Stadt hat am Montag beschlossen, dass die alte Brücke für Lastwagen {} gesperrt wird."
    english = "The committee of the town decided on Monday that the old bridge will be closed to all heavy lorries."
    rows = [document(str(number), german.format(number)) for number in range(8)]
    figures = run(tmp_path, {"corpus": [*rows, document("e", english), document("f", english)]}, curate=CURATE)
    assert figures["corpus_kept_rows"] == 1
    report = json.loads((tmp_path / "out/report/validation.json").read_text(encoding="utf-8"))[0]
    assert report["invalid"] == 0
    assert report["reasons"][0]["reason"] == "language: de, not en"
    assert report["reasons"][0]["rejected"] == [{"source": "pages", "language": "de", "count": 8}]
    languages = {row["language"]: (row["kept"], row["rejected"]) for row in report["languages"]}
    assert languages == {"de": (0, 8), "en": (1, 0)}  # a copy is rejected before its language is asked for
    assert "8 stop words, mean word length 3 to 10, sentence ends" in page(tmp_path)
    markdown = (tmp_path / "out/report/validation.md").read_text(encoding="utf-8")
    assert "- rejected 8 rows: language: de, not en (pages de 8)" in markdown
    assert "- language en: 1 kept, 0 rejected; 8 stop words" in markdown


def test_invalid_rows_beyond_the_share_name_the_limit(tmp_path: Path) -> None:
    rows = [chat(str(number), "user:What?", f"assistant:{' ' * (number < 3)}{number if number > 2 else ''}")
            for number in range(10)]  # fmt: skip
    with pytest.raises(StageError) as caught:
        run(tmp_path, {"instructions": rows})
    assert "at most 20% of the rows were invalid" in str(caught.value)
    assert "found 30.00%. Correct the sources, or change validate.max_rejected_share." in str(caught.value)
    assert "3 × an empty message" in str(caught.value)


def test_declared_language_of_a_source_decides_the_rules(tmp_path: Path) -> None:
    short = "Über die Brücke."
    rows = {"corpus": [document("a", short, "handbuch"), document("b", short + " Ja!", "other")]}
    run(tmp_path, rows, curate={"languages": {"handbuch": "de"}, "quality": {"min_words": 1}})
    report = json.loads((tmp_path / "out/report/validation.json").read_text(encoding="utf-8"))[0]
    assert {row["language"] for row in report["languages"]} == {"de", "und"}
