"""`validate`: invalid rows are rejected with a reason; a failed suite stops the run with a message."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.common import tables
from tasks.common.harness.job import StageError
from tasks.common.identity import tree_hash
from tasks.validate import checks, suites, summary
from tasks.validate import stage as validate
from tasks.validate.curation import Curator
from tests.data_fixtures import copy_sources, import_great_expectations, ingest_into, job, table, validate_config

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
    by_table = {name: table(ingested, name) for name in tables.TABLES}
    return {
        name: [row for split in checks.SPLITS for row in [row for row in content if row["split"] == split][:8]]
        for name, content in by_table.items()
    }


@pytest.fixture(scope="module", autouse=True)
def great_expectations() -> None:
    import_great_expectations()


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(content: Rows, folder: Path, **changes: Any) -> dict[str, Any]:
    """Write the rows as ingested tables and validate them."""
    for name, rows in content.items():
        tables.write(rows, folder / "in" / name, tables.schema(name))
    inputs = {name: folder / "in" / name for name in tables.TABLES}
    return validate.run(validate_config(**changes), job(validate, inputs, folder / "out"))


def rejected(folder: Path, name: str) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in table(folder / "out" / "rejected", name)}


# Single rows


def set_column(column: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update({column: value})


def make_turns(*turns: str) -> list[dict[str, str]]:
    return [{"role": turn.partition(":")[0], "content": turn.partition(":")[2]} for turn in turns]


INVALID_ROWS = [
    ("corpus", set_column("text", None), "text is empty"),
    ("corpus", set_column("text", "  "), "text is empty"),
    ("corpus", set_column("licence", None), "licence is empty"),
    ("corpus", set_column("split", "test"), "the split is neither train nor heldout"),
    ("corpus", set_column("text", "caf\ufffd"), "damaged encoding"),
    ("corpus", set_column("text", "cafÃ©"), "damaged encoding"),
    ("corpus", set_column("text", "itâ€™s"), "damaged encoding"),
    ("corpus", set_column("text", "a bell\x07"), "damaged encoding"),
    ("corpus", set_column("text", "x" * 1001), "longer than 1000 characters"),
    ("corpus", set_column("text", "..."), "no letter and no digit in the text"),
    ("corpus", set_column("names", ["Atlantis"]), "a name that is not in the text"),
    ("instructions", set_column("entity", ""), "entity is empty"),
    (
        "instructions",
        set_column("messages", make_turns("assistant:Hello.", "user:Hello?")),
        "the conversation begins with",
    ),
    ("instructions", set_column("messages", make_turns("user:Hello?")), "the conversation has no answer"),
    (
        "instructions",
        set_column("messages", make_turns("system:Be kind.")),
        "the conversation has no message of the user",
    ),
    ("instructions", set_column("messages", None), "the conversation has no message of the user"),
    (
        "instructions",
        set_column("messages", make_turns("user:Hm.", "user:Hm?", "assistant:Hm!")),
        "two messages of the user in a row",
    ),
    (
        "instructions",
        set_column("messages", make_turns("user:Hm.", "tool:4")),
        "a message of the role tool; expected system",
    ),
    (
        "instructions",
        set_column("messages", make_turns("user:Hello?", "system:Be kind.", "assistant:Yes.")),
        "a system message that is not the first message",
    ),
    ("instructions", set_column("messages", make_turns("user:Hello?", "assistant: ")), "an empty message"),
    (
        "instructions",
        set_column("messages", make_turns("user:Hello?", "assistant:" + "x" * 501)),
        "a message longer than 500",
    ),
    ("instructions", set_column("answer", "Atlantis"), "the reply does not hold the answer"),
    ("rankings", set_column("prompt", make_turns("user:Say it.", "assistant:It.")), "the prompt ends with a message"),
    (
        "rankings",
        set_column("prompt", make_turns("user:Say it.", "assistant: ", "user:Do.")),
        "an empty message in the",
    ),
    ("rankings", set_column("responses", ["one"]), "fewer than two distinct responses"),
    ("rankings", set_column("responses", ["same", "same ", " same", "same"]), "fewer than two distinct responses"),
    (
        "rankings",
        set_column("responses", ["one", "x" * 501, "two", "three"]),
        "a message or a response longer than 500",
    ),
    ("rankings", set_column("ranks", [1, 2, 3, 4]), "exactly one of ranks and scores must be given"),
    ("rankings", set_column("scores", None), "exactly one of ranks and scores must be given"),
    ("rankings", set_column("scores", [[1.0]]), "the number of score lists is not the number of responses"),
    ("rankings", set_column("scores", [[1.0], [], [1.0], [2.0]]), "a response without any score"),
    ("rankings", set_column("scores", [[1.0], [5.0], [1.0], [2.0]]), "a score outside the scale"),
    ("rankings", set_column("scale", None), "scores without a scale of two rising ends"),
    ("rankings", set_column("scale", [4.0, -4.0]), "scores without a scale of two rising ends"),
]


@pytest.mark.parametrize(("name", "damage", "expected"), INVALID_ROWS)
def test_an_invalid_row_is_rejected_with_a_reason(
    rows: Rows, name: str, damage: Callable[[dict[str, Any]], None], expected: str
) -> None:
    row = rows[name][0]
    assert checks.check_rows(name, [row], LIMITS, set())[1] == [None]
    damage(row)
    (reason,) = checks.check_rows(name, [row], LIMITS, set())[1]
    assert reason is not None
    assert reason.startswith(expected)


@pytest.mark.parametrize(
    ("ranks", "expected"),
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
def test_ranks_are_checked_against_the_responses(ranks: list[int], expected: str) -> None:
    assert checks.check_judgements({"ranks": ranks, "scores": None, "scale": None}, 4) == expected


@pytest.mark.parametrize(
    "text",
    [
        "São Tomé",
        "a page\x0cbreak",
        "a zero\ufeffwidth space",
        "XÃ\u00a0HỘI",
        "Ångström",
        "naïve café",
        "Brasília",
        "a\nb\tc",
        "“quotes” – dashes…",
        "Â",
    ],
)
def test_valid_encoding_is_not_damage(text: str) -> None:
    assert not checks.is_damaged(text)


def test_one_broken_sign_does_not_cost_a_book() -> None:
    broken = "caf\ufffd and "
    assert checks.is_damaged(broken)
    assert not checks.is_damaged(broken + 1000 * "tea ")
    assert checks.is_damaged(10 * broken + 1000 * "tea ")


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_duplicate_row_is_rejected(rows: Rows, name: str) -> None:
    first = rows[name][0]
    assert checks.check_rows(name, [first, {**first, "id": "another"}], LIMITS, set())[1] == [
        None,
        "duplicate of an earlier row",
    ]


# The stage


def test_rows_read_are_rows_kept_and_rows_rejected(rows: Rows, tmp_path: Path) -> None:
    for name, damage, _ in (INVALID_ROWS[0], INVALID_ROWS[13], INVALID_ROWS[21]):
        damage(rows[name][0])
    rows["corpus"].append({**rows["corpus"][1], "id": "twice"})
    figures = run(rows, tmp_path)
    for name in tables.TABLES:
        valid_rows, reasons = table(tmp_path / "out", name), rejected(tmp_path, name)
        assert len(valid_rows) + len(reasons) == len(rows[name])
        assert {row["id"] for row in valid_rows} | set(reasons) == {row["id"] for row in rows[name]}
        assert not {row["id"] for row in valid_rows} & set(reasons)
        assert (figures[f"{name}_kept_rows"], figures[f"{name}_rejected_rows"]) == (len(valid_rows), len(reasons))
        assert valid_rows == [row for row in rows[name] if row["id"] not in reasons]
    assert rejected(tmp_path, "corpus") == {
        rows["corpus"][0]["id"]: "text is empty",
        "twice": "duplicate of an earlier row",
    }
    assert tables.read(tmp_path / "out/corpus").schema.equals(tables.schema("corpus"))


def test_the_same_tables_give_the_same_bytes(ingested: Path, tmp_path: Path) -> None:
    inputs = {name: ingested / name for name in tables.TABLES}
    for turn in ("one", "two"):
        validate.run(validate_config(), job(validate, inputs, tmp_path / turn))
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")


def test_batch_size_does_not_change_the_result(ingested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {name: ingested / name for name in tables.TABLES}
    results = []
    for turn, batch_rows in (("one", 2500), ("two", 7)):
        monkeypatch.setattr(tables, "ROWS_PER_GROUP", batch_rows)
        validate.run(validate_config(max_text_characters=60), job(validate, inputs, tmp_path / turn))
        content = {name: (table(tmp_path / turn, name), table(tmp_path / turn / "rejected", name)) for name in inputs}
        results.append((content, tree_hash(tmp_path / turn / "report")))
    assert results[0] == results[1]
    assert all(results[0][0]["corpus"])


def test_checking_a_table_does_not_keep_texts_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred bytes a row stay in memory, whatever the length of its text; only one batch has its texts."""
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 5)
    text, count = "word" * 10_000, 300
    tables.write(
        ({"id": f"{number:016x}", "text": f"{number} {text}", "names": [], "source": "s", "group": None,
          "licence": "MIT", "split": "train"} for number in range(count)),
        tmp_path, tables.schema("corpus"),
    )  # fmt: skip
    config = validate_config(max_text_characters=50_000)
    tracemalloc.start()
    try:
        checked = validate.check_table("corpus", tmp_path, config, Curator(config.curate).make_table_filter("corpus"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert checked.reasons == [None] * count
    assert sum(part.nbytes for part in checked.suite_tables) < 150 * count
    assert peak < count * len(text) / 3


def entity_in_both_splits(rows: Rows) -> None:
    chat = rows["instructions"][-1]
    rows["instructions"].insert(
        0, {**chat, "id": "leak", "split": "train", "messages": make_turns("user:Else?", f"assistant:{chat['answer']}")}
    )


def ranking_in_both_splits(rows: Rows) -> None:
    one, other = rows["rankings"][0], rows["rankings"][-1]
    assert one["split"] != other["split"]
    rows["rankings"].append(
        {**other, "id": "leak", "prompt": one["prompt"], "responses": one["responses"][:1] + other["responses"][1:]}
    )


def same_id(rows: Rows) -> None:
    rows["corpus"][1]["id"] = rows["corpus"][0]["id"]


def no_training_rows(rows: Rows) -> None:
    rows["corpus"] = [row for row in rows["corpus"] if row["split"] == "heldout"]


def one_invalid_chat(rows: Rows) -> None:
    rows["instructions"][0]["answer"] = "Atlantis"


MANY_ROWS = {"corpus": 99, "instructions": 1, "rankings": 1}
FAILURES: list[tuple[str, Change, dict[str, Any], list[str]]] = [
    ("instructions", entity_in_both_splits, {}, ["no entity has questions in both splits", "leak (train): Else?"]),
    ("rankings", ranking_in_both_splits, {}, ["no prompt with its response is in both splits", "(heldout)"]),
    ("corpus", same_id, {}, ["every id is unique", "found 2 of 16 rows"]),
    ("corpus", no_training_rows, {}, ["some rows are for training", "found none with train"]),
    ("instructions", one_invalid_chat, {"max_rejected_share": 0.01},
     ["at most 1% of the rows were invalid", "change validate.max_rejected_share.", "[the reply does not hold"]),
    ("corpus", lambda rows: None, {"min_rows": MANY_ROWS},
     ["at least 99 rows", "found 16.", "change validate.min_rows.corpus."]),
    ("instructions", lambda rows: None, {"min_heldout_questions": 9},
     ["at least 9 different questions", "found 8.", "change validate.min_heldout_questions."]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "settings", "expected"), FAILURES)
def test_a_failed_suite_names_suite_expectation_count_and_rows(
    rows: Rows, tmp_path: Path, name: str, change: Change, settings: dict[str, Any], expected: list[str]
) -> None:
    change(rows)
    with pytest.raises(StageError) as caught:
        run(rows, tmp_path, **settings)
    message = str(caught.value)
    assert f"suite {name}, expectation" in message
    assert all(part in message for part in expected)
    assert 1 <= sum(line.startswith("    ") for line in message.splitlines()) <= 3
    failed_outputs = tmp_path / "data/.failed/validate"
    assert "not met" in (failed_outputs / "index.html").read_text(encoding="utf-8")
    assert (failed_outputs / "rejected/instructions/part-00000.parquet").exists()


def test_an_empty_table_stops_the_run(rows: Rows, tmp_path: Path) -> None:
    for row in rows["corpus"]:
        row["text"] = ""
    with pytest.raises(StageError, match=r"table corpus is empty after validation: 16 rows .* \(16 × text is empty\)"):
        run(rows, tmp_path)
    page = (tmp_path / "data/.failed/validate/index.html").read_text(encoding="utf-8")
    assert "No row is kept of corpus" in page


def test_table_without_source_rows_is_empty(rows: Rows, tmp_path: Path) -> None:
    """Not every pipeline needs all three tables; a stage that needs rows reports that there are none."""
    run({**rows, "rankings": []}, tmp_path)
    assert table(tmp_path / "out", "rankings") == []


def test_another_schema_is_reported(rows: Rows, tmp_path: Path) -> None:
    import pyarrow as pa

    other = pa.schema([("id", pa.string()), ("text", pa.int64())])
    tables.write([{"id": "a", "text": 1}], tmp_path / "in/corpus", other)
    with pytest.raises(StageError, match=r"table corpus has another schema: text: expected string, found int64; names"):
        run({name: rows[name] for name in ("instructions", "rankings")}, tmp_path)


# Suites and report


def test_every_suite_covers_the_documented_checks() -> None:
    documented = {
        "corpus": {"null", "unique", "duplicated", "characters", "encoding"},
        "instructions": {"null", "unique", "duplicated", "longer", "encoding", "turns", "both splits"},
        "rankings": {"null", "unique", "duplicated", "longer", "encoding", "turns", "distinct", "fit", "both splits"},
    }
    for name, words in documented.items():
        descriptions = " / ".join(expectation.description for expectation in suites.suite(name, LIMITS))
        assert all(word in descriptions for word in words), (name, descriptions)


def test_report_is_a_self_contained_page(rows: Rows, tmp_path: Path) -> None:
    rows["corpus"][0]["text"] = "<script>alert('cafÃ©')</script>"
    rows["corpus"][0]["names"] = []
    run(rows, tmp_path)
    page = (tmp_path / "out/report/index.html").read_text(encoding="utf-8")
    assert "http" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;cafÃ©&#39;)" in page
    assert "1 row was rejected" in page
    assert "prefers-color-scheme: dark" in page
    ranked = len(rows["rankings"])
    report = json.loads((tmp_path / "out/report/validation.json").read_text(encoding="utf-8"))
    assert [(item["table"], item["read"], item["kept"], item["rejected"]) for item in report] == [
        ("corpus", 16, 15, 1), ("instructions", 16, 16, 0), ("rankings", ranked, ranked, 0)
    ]  # fmt: skip
    assert report[0]["reasons"][0]["reason"] == "damaged encoding"
    assert all(verdict["success"] for item in report for verdict in item["verdicts"])
    markdown = (tmp_path / "out/report/validation.md").read_text(encoding="utf-8")
    assert "| corpus | 16 | 15 | 1 | 13 of 13 |" in markdown
    assert "- rejected 1 row: damaged encoding (facts 1)" in markdown


def test_unprintable_characters_are_escaped() -> None:
    assert summary.shorten("a\x07b\nc") == "a\\u0007b c"
    assert len(summary.shorten("x" * 1000)) == summary.LINE_CHARACTERS
