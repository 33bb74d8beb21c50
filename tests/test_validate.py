"""What is promised of `validate`: bad rows are kept aside with a reason; a suite that fails stops the run, and why."""

import importlib
import json
import re
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import validate
from tasks.common import tables
from tasks.common.identity import tree_hash
from tasks.common.stage import StageError
from tasks.common.text import chat
from tasks.common.validation import checks, report, suites
from tasks.common.validation.curation import Curator
from tests.data_fixtures import copy_sources, ingest_into, job, table, validate_config

Rows = dict[str, list[dict[str, Any]]]
Change = Callable[[Rows], None]
LIMITS = validate_config()


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ingested")
    return ingest_into(folder / "out", copy_sources(folder))


@pytest.fixture
def rows(ingested: Path) -> Rows:
    """A few rows of each table, of both splits."""
    found = {name: table(ingested, name) for name in tables.TABLES}
    return {
        name: [row for split in checks.SPLITS for row in [row for row in content if row["split"] == split][:8]]
        for name, content in found.items()
    }


@pytest.fixture(scope="module", autouse=True)
def great_expectations() -> None:
    """Import the library once: while it is imported it uses deprecated modules of Python's own, not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("great_expectations")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(content: Rows, folder: Path, **changes: Any) -> dict[str, Any]:
    """Write the rows as ingested tables and validate them."""
    for name, rows in content.items():
        tables.write(rows, folder / "in" / name, tables.schema(name))
    inputs = {name: folder / "in" / name for name in tables.TABLES}
    return validate.run(validate_config(**changes), job(validate, inputs, folder / "out"))


def refused(folder: Path, name: str) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in table(folder / "out" / "refused", name)}


# Single rows


def damage(column: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update({column: value})


def say(*turns: str) -> list[dict[str, str]]:
    return [{"role": turn.partition(":")[0], "content": turn.partition(":")[2]} for turn in turns]


BAD_ROWS = [
    ("corpus", damage("text", None), "text is empty"),
    ("corpus", damage("text", "  "), "text is empty"),
    ("corpus", damage("licence", None), "licence is empty"),
    ("corpus", damage("split", "test"), "the split is neither train nor heldout"),
    ("corpus", damage("text", "caf\ufffd"), "damaged encoding"),
    ("corpus", damage("text", "cafÃ©"), "damaged encoding"),
    ("corpus", damage("text", "itâ€™s"), "damaged encoding"),
    ("corpus", damage("text", "a bell\x07"), "damaged encoding"),
    ("corpus", damage("text", "a [MASK] more"), "the text holds [MASK], which is reserved for the chat template"),
    ("corpus", damage("text", "x" * 1001), "longer than 1000 characters"),
    ("corpus", damage("text", "..."), "no letter and no digit in the text"),
    ("corpus", damage("names", ["Atlantis"]), "a name that is not in the text"),
    ("instructions", damage("entity", ""), "entity is empty"),
    ("instructions", damage("messages", say("assistant:Hello.", "user:Hello?")), "turns are not"),
    ("instructions", damage("messages", say("user:Hello?")), "turns are not"),
    ("instructions", damage("messages", say("user:Hello?", "system:Be kind.", "assistant:Yes.")), "turns are not"),
    ("instructions", damage("messages", say("user:Hello?", "assistant: ")), "an empty message"),
    ("instructions", damage("messages", say("user:Hello?", "assistant:" + "x" * 501)), "a message longer than 500"),
    ("instructions", damage("messages", say("user:Hi?<|end|>", "assistant:Yes.")), "the text holds <|end|>"),
    ("instructions", damage("answer", "Atlantis"), "the reply does not hold the answer"),
    ("rankings", damage("prompt", say("user:Say it.", "assistant:It.")), "the prompt is not"),
    ("rankings", damage("prompt", say("user:Say it.<|user|>")), "the text holds <|user|>"),
    ("rankings", damage("responses", ["a", "b", "c", "d<|assistant|>"]), "the text holds <|assistant|>"),
    ("rankings", damage("responses", ["one"]), "fewer than two distinct responses"),
    ("rankings", damage("responses", ["same", "same ", " same", "same"]), "fewer than two distinct responses"),
    ("rankings", damage("responses", ["one", "", "two", "three"]), "an empty message or response"),
    ("rankings", damage("responses", ["one", "x" * 501, "two", "three"]), "a message or a response longer than 500"),
    ("rankings", damage("ranks", [1, 2, 3, 4]), "exactly one of ranks and scores must be given"),
    ("rankings", damage("scores", None), "exactly one of ranks and scores must be given"),
    ("rankings", damage("scores", [[1.0]]), "the number of score lists is not the number of responses"),
    ("rankings", damage("scores", [[1.0], [], [1.0], [2.0]]), "a response without any score"),
    ("rankings", damage("scores", [[1.0], [5.0], [1.0], [2.0]]), "a score outside the scale"),
    ("rankings", damage("scale", None), "scores without a scale of two rising ends"),
    ("rankings", damage("scale", [4.0, -4.0]), "scores without a scale of two rising ends"),
]


@pytest.mark.parametrize(("name", "harm", "told"), BAD_ROWS)
def test_a_bad_row_has_a_reason(rows: Rows, name: str, harm: Callable[[dict[str, Any]], None], told: str) -> None:
    row = rows[name][0]
    assert checks.judge(name, [row], LIMITS, set())[1] == [None]
    harm(row)
    (reason,) = checks.judge(name, [row], LIMITS, set())[1]
    assert reason is not None
    assert reason.startswith(told)


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([1, 2, 3, 4], "fits"),
        ([1, 1, 2, 2], "fits"),
        ([4, 3, 2, 1], "fits"),
        ([0, 1, 2, 3], "ranks do not run from 1 to the number of responses"),
        ([2, 3, 4, 4], "ranks do not run from 1 to the number of responses"),
        ([1, 2, 3, 5], "ranks do not run from 1 to the number of responses"),
        ([1, 2, 3], "the number of ranks is not the number of responses"),
    ],
)
def test_ranks_fit_their_responses(ranks: list[int], told: str) -> None:
    assert checks.judgement_fit({"ranks": ranks, "scores": None, "scale": None}, 4) == told


@pytest.mark.parametrize(
    "text", ["São Tomé", "Ångström", "naïve café", "Brasília", "a\nb\tc", "“quotes” – dashes…", "Â"]
)
def test_sound_encoding_is_not_damage(text: str) -> None:
    assert not re.search(checks.DAMAGE, text)


def test_the_reserved_tokens_are_those_of_the_chat_template() -> None:
    assert sorted(checks.CONTROL_TOKENS) == sorted(chat.SPECIAL_TOKENS)


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_row_that_came_before_is_refused(rows: Rows, name: str) -> None:
    first = rows[name][0]
    assert checks.judge(name, [first, {**first, "id": "another"}], LIMITS, set())[1] == [
        None,
        "the same content came before",
    ]


# The stage


def test_rows_read_are_rows_kept_and_rows_refused(rows: Rows, tmp_path: Path) -> None:
    for name, harm, _ in (BAD_ROWS[0], BAD_ROWS[13], BAD_ROWS[21]):
        harm(rows[name][0])
    rows["corpus"].append({**rows["corpus"][1], "id": "twice"})
    figures = run(rows, tmp_path)
    for name in tables.TABLES:
        kept, aside = table(tmp_path / "out", name), refused(tmp_path, name)
        assert len(kept) + len(aside) == len(rows[name])
        assert {row["id"] for row in kept} | set(aside) == {row["id"] for row in rows[name]}
        assert not {row["id"] for row in kept} & set(aside)
        assert (figures[f"{name}_kept_rows"], figures[f"{name}_refused_rows"]) == (len(kept), len(aside))
        assert kept == [row for row in rows[name] if row["id"] not in aside]
    assert refused(tmp_path, "corpus") == {
        rows["corpus"][0]["id"]: "text is empty",
        "twice": "the same content came before",
    }
    assert tables.read(tmp_path / "out/corpus").schema.equals(tables.schema("corpus"))


def test_the_same_tables_give_the_same_bytes(ingested: Path, tmp_path: Path) -> None:
    inputs = {name: ingested / name for name in tables.TABLES}
    for turn in ("one", "two"):
        validate.run(validate_config(), job(validate, inputs, tmp_path / turn))
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")


def test_how_many_rows_are_read_at_once_decides_nothing(
    ingested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: ingested / name for name in tables.TABLES}
    found = []
    for turn, at_once in (("one", 2500), ("two", 7)):
        monkeypatch.setattr(tables, "ROWS_PER_GROUP", at_once)
        validate.run(validate_config(text_characters=60), job(validate, inputs, tmp_path / turn))
        content = {name: (table(tmp_path / turn, name), table(tmp_path / turn / "refused", name)) for name in inputs}
        found.append((content, tree_hash(tmp_path / turn / "report")))
    assert found[0] == found[1]
    assert all(found[0][0]["corpus"])


def test_texts_are_not_held_while_a_table_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of a row is some hundred bytes, however long its text is; only a batch has its texts in memory."""
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 5)
    text, count = "word" * 10_000, 300
    tables.write(
        ({"id": f"{number:016x}", "text": f"{number} {text}", "names": [], "source": "s", "group": None,
          "licence": "MIT", "split": "train"} for number in range(count)),
        tmp_path, tables.schema("corpus"),
    )  # fmt: skip
    config = validate_config(text_characters=50_000)
    tracemalloc.start()
    try:
        judged = validate.judge("corpus", tmp_path, config, Curator(config.curate).look_at("corpus"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert judged.reasons == [None] * count
    assert sum(part.nbytes for part in judged.seen) < 150 * count
    assert peak < count * len(text) / 3


def both_sides(rows: Rows) -> None:
    chat = rows["instructions"][-1]
    rows["instructions"].insert(
        0, {**chat, "id": "leak", "split": "train", "messages": say("user:Else?", f"assistant:{chat['answer']}")}
    )


def both_sides_of_rankings(rows: Rows) -> None:
    one, other = rows["rankings"][0], rows["rankings"][-1]
    assert one["split"] != other["split"]
    rows["rankings"].append(
        {**other, "id": "leak", "prompt": one["prompt"], "responses": one["responses"][:1] + other["responses"][1:]}
    )


def same_id(rows: Rows) -> None:
    rows["corpus"][1]["id"] = rows["corpus"][0]["id"]


def nothing_to_train_on(rows: Rows) -> None:
    rows["corpus"] = [row for row in rows["corpus"] if row["split"] == "heldout"]


def one_bad_chat(rows: Rows) -> None:
    rows["instructions"][0]["answer"] = "Atlantis"


MANY = {"corpus": 99, "instructions": 1, "rankings": 1}
FAILURES: list[tuple[str, Change, dict[str, Any], list[str]]] = [
    ("instructions", both_sides, {}, ["no entity's questions stand on both sides of the split", "leak (train): Else?"]),
    ("rankings", both_sides_of_rankings, {}, ["no prompt with its response stands on both sides", "(heldout)"]),
    ("corpus", same_id, {}, ["every id is unique", "found 2 of 16 rows"]),
    ("corpus", nothing_to_train_on, {}, ["some rows are for training", "found none with train"]),
    ("instructions", one_bad_chat, {"refused_share": 0.01}, ["at most 1% of the rows", "[the reply does not hold"]),
    ("corpus", lambda rows: None, {"rows": MANY}, ["at least 99 rows", "found 16."]),
    ("instructions", lambda rows: None, {"heldout_questions": 9}, ["at least 9 different questions", "found 8."]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "settings", "told"), FAILURES)
def test_a_failed_suite_names_suite_expectation_count_and_rows(
    rows: Rows, tmp_path: Path, name: str, change: Change, settings: dict[str, Any], told: list[str]
) -> None:
    change(rows)
    with pytest.raises(StageError) as caught:
        run(rows, tmp_path, **settings)
    message = str(caught.value)
    assert f"suite {name}, expectation" in message
    assert all(part in message for part in told)
    assert 1 <= sum(line.startswith("    ") for line in message.splitlines()) <= 3
    kept = tmp_path / "data/.failed/validate"
    assert "not met" in (kept / "index.html").read_text(encoding="utf-8")
    assert (kept / "refused/instructions/part-00000.parquet").exists()


def test_an_empty_table_stops_the_run(rows: Rows, tmp_path: Path) -> None:
    for row in rows["corpus"]:
        row["text"] = ""
    with pytest.raises(StageError, match=r"table corpus is empty after validation: 16 rows .* \(16 × text is empty\)"):
        run(rows, tmp_path)
    page = (tmp_path / "data/.failed/validate/index.html").read_text(encoding="utf-8")
    assert "Nothing is left of corpus" in page


def test_a_table_without_any_row_stops_the_run(rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"table rankings is empty after validation: 0 rows came in"):
        run({**rows, "rankings": []}, tmp_path)


def test_another_schema_is_told(rows: Rows, tmp_path: Path) -> None:
    import pyarrow as pa

    other = pa.schema([("id", pa.string()), ("text", pa.int64())])
    tables.write([{"id": "a", "text": 1}], tmp_path / "in/corpus", other)
    with pytest.raises(StageError, match=r"table corpus has another schema: text: expected string, found int64; names"):
        run({name: rows[name] for name in ("instructions", "rankings")}, tmp_path)


# Suites and report


def test_every_suite_covers_what_is_promised() -> None:
    promised = {
        "corpus": {"null", "unique", "twice", "characters", "encoding"},
        "instructions": {"null", "unique", "twice", "longer", "encoding", "turns", "both sides"},
        "rankings": {"null", "unique", "twice", "longer", "encoding", "turns", "distinct", "fit", "both sides"},
    }
    for name, words in promised.items():
        says = " / ".join(expectation.says for expectation in suites.suite(name, LIMITS))
        assert all(word in says for word in words), (name, says)


def test_the_report_is_one_page_without_the_internet(rows: Rows, tmp_path: Path) -> None:
    rows["corpus"][0]["text"] = "<script>alert('cafÃ©')</script>"
    rows["corpus"][0]["names"] = []
    run(rows, tmp_path)
    page = (tmp_path / "out/report/index.html").read_text(encoding="utf-8")
    assert "http" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;cafÃ©&#39;)" in page
    assert "1 row was refused" in page
    assert "prefers-color-scheme: dark" in page
    ranked = len(rows["rankings"])
    found = json.loads((tmp_path / "out/report/validation.json").read_text(encoding="utf-8"))
    assert [(item["table"], item["read"], item["kept"], item["refused"]) for item in found] == [
        ("corpus", 16, 15, 1), ("instructions", 16, 16, 0), ("rankings", ranked, ranked, 0)
    ]  # fmt: skip
    assert found[0]["reasons"][0]["reason"] == "damaged encoding"
    assert all(verdict["success"] for item in found for verdict in item["verdicts"])
    told = (tmp_path / "out/report/validation.md").read_text(encoding="utf-8")
    assert "| corpus | 16 | 15 | 1 | 13 of 13 |" in told
    assert "- refused 1 row: damaged encoding" in told


def test_signs_that_cannot_be_shown_are_written_as_codes() -> None:
    assert report.shorten("a\x07b\nc") == "a\\u0007b c"
    assert len(report.shorten("x" * 1000)) == report.LINE_CHARACTERS
