"""Validation of rankings: contradictions of one annotator, agreement of several, length bias, the report."""

import json
import tracemalloc
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common import tables
from tasks.common.identity import tree_hash
from tasks.validate import report
from tasks.validate import stage as validate
from tasks.validate.curation import Curator
from tasks.validate.judgements import CONTRADICTION_REASON, Contradictions, JudgementStatistics
from tests.data_fixtures import import_great_expectations, job, table, validate_config

SCRIPT = "<script>alert(1)</script>"
DOCUMENT: dict[str, Any] = {
    "id": "d", "text": "A duck swims.", "names": [], "source": "s", "group": None, "licence": "MIT", "split": "train",
}  # fmt: skip
CHAT = {"id": "c", "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}],
        "entity": "e", "answer": None, "tone": None, "source": "s", "split": "train"}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def great_expectations() -> None:
    import_great_expectations()


def ranking(
    identifier: str, responses: list[str], judgements: list[Any], annotator: str | None = None, **more: Any
) -> dict[str, Any]:
    """Return a ranking by ranks, or by scores from -10 to 10 where each response has a list of them."""
    rated = isinstance(judgements[0], list)
    return {
        "id": identifier, "prompt": [{"role": "user", "content": "Tell a joke."}], "responses": responses,
        "ranks": None if rated else judgements, "scores": judgements if rated else None,
        "scale": [-10.0, 10.0] if rated else None, "annotators": 1, "annotator": annotator, "models": [],
        "source": "jokes", "split": "train", **more,
    }  # fmt: skip


def run(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    content = {"corpus": [DOCUMENT], "instructions": [CHAT], "rankings": rows}
    for name, rows_of_table in content.items():
        tables.write(rows_of_table, folder / "in" / name, tables.schema(name))
    inputs = {name: folder / "in" / name for name in tables.TABLES}
    return validate.run(validate_config(max_rejected_share=0.9), job(validate, inputs, folder / "out"))


def rejected(folder: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in table(folder / "out" / "rejected", "rankings")}


def figures(*rows: dict[str, Any]) -> dict[str, Any]:
    statistics = JudgementStatistics()
    for row in rows:
        statistics.add(row)
    ((by_scale,),) = (kinds.values() for kinds in statistics.figures().values())
    return by_scale


# Contradictions of one annotator


def find_contradictions(*rows: dict[str, Any]) -> list[int]:
    contradictions = Contradictions()
    for position, row in enumerate(rows):
        contradictions.add(position, row)
    return contradictions.find_positions()


def test_opposite_preferences_of_one_annotator_are_contradictions() -> None:
    pair, swapped = ["Knock.", "A duck."], ["A duck.", "Knock."]
    assert find_contradictions(ranking("1", pair, [1, 2], "ann"), ranking("2", pair, [2, 1], "ann")) == [0, 1]
    assert find_contradictions(ranking("1", pair, [1, 2], "ann"), ranking("2", swapped, [1, 2], "ann")) == [0, 1]
    assert find_contradictions(ranking("1", pair, [1, 2], "ann"), ranking("2", swapped, [2, 1], "ann")) == []
    assert find_contradictions(ranking("1", pair, [[8.0], [-10.0]], "ann"), ranking("2", pair, [2, 1], "ann")) == [0, 1]
    of_three = ranking("2", ["Two ducks.", *swapped], [1, 1, 2], "ann")
    assert find_contradictions(
        of_three, ranking("1", pair, [1, 2], "ann"), ranking("3", ["x", "y"], [1, 2], "ann")
    ) == [0, 1]


def test_ties_other_annotators_and_other_prompts_are_not_contradictions() -> None:
    pair = ["Knock.", "A duck."]
    first = ranking("1", pair, [1, 2], "ann")
    other = {"prompt": [{"role": "user", "content": "Tell another."}]}
    assert find_contradictions() == []
    assert find_contradictions(first, ranking("2", pair, [1, 1], "ann")) == []
    assert find_contradictions(first, ranking("2", pair, [2, 1], "ben"), ranking("3", pair, [2, 1])) == []
    assert find_contradictions(first, ranking("2", pair, [2, 1], "ann", **other)) == []


def test_invalid_rankings_are_rejected_and_disagreement_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pair = ["Knock.", "A duck."]
    rows = [
        ranking("ann", pair, [1, 2], "ann"), ranking("ben", pair, [2, 1], "ben"), ranking("cat", pair, [1, 2], "cat"),
        ranking("nobody", pair, [1, 2]), ranking("again", pair[::-1], [2, 1]),
        ranking("one way", ["a", "b"], [1, 2], "dan"), ranking("the other", ["b", "a", "c"], [1, 2, 3], "dan"),
        ranking("repeated", ["a", "b", " a"], [1, 2, 3]), ranking("single", ["a"], [1]),
        ranking("many", pair, [1, 2, 3]), ranking("outside", pair, [[-11.0], [8.0]]),
        ranking("script", [SCRIPT, "A plain joke."], [1, 2]),
    ]  # fmt: skip
    metrics = run(rows, tmp_path)
    assert rejected(tmp_path) == {
        "again": "duplicate of an earlier row",
        "one way": CONTRADICTION_REASON,
        "the other": CONTRADICTION_REASON,
        "repeated": "two of the responses are the same text",
        "single": "fewer than two distinct responses",
        "many": "the number of ranks is not the number of responses",
        "outside": "a score outside the scale",
    }
    responses_by_id = {row["id"]: row["responses"] for row in table(tmp_path / "out", "rankings")}
    assert set(responses_by_id) == {"ann", "ben", "cat", "nobody", "script"}
    assert responses_by_id["script"][0] == SCRIPT
    ranks = metrics["rankings"]["jokes"]["ranks"]
    assert (ranks["rankings"], ranks["annotators"], ranks["unnamed"]) == (5, 3, 2)
    assert (ranks["units"], ranks["judgements"]) == (1, 3)


# Figures


def test_alpha_is_1_for_equal_preferences_and_negative_for_opposite_ones() -> None:
    pair, other = ["Knock.", "A duck."], ["one", "two"]
    same = [ranking("1", pair, [1, 2], "ann"), ranking("2", pair[::-1], [2, 1], "ben")]
    assert figures(*same)["alpha"] == 1
    # In both orders there are two of each preference, at a squared distance of 4: 1 - 4 * 4 / (2 * 2 * 2 / 3 * 4).
    assert figures(same[0], ranking("2", pair, [2, 1], "ben"))["alpha"] == -0.5
    more = [ranking("3", other, [1, 2], "ann"), ranking("4", other, [2, 1], "ben")]
    assert figures(*same, *more)["alpha"] == pytest.approx(1 - 4 * 16 / (2 * 4 * 4 / 7 * 16), abs=1e-4)
    assert figures(same[0], ranking("2", pair, [1, 2]))["alpha"] is None, "an unnamed annotator may be the same person"
    again = ranking("5", [*pair, "x"], [1, 2, 3], "ann")
    assert figures(*same, again)["judgements"] == 2, "an annotator counts once for each unit"


def test_scores_in_one_row_or_in_several_give_the_same_alpha() -> None:
    responses = ["Knock.", "A duck."]
    one_row = figures(ranking("1", responses, [[-10.0, -9.0], [8.0, 10.0]]))
    two_rows = figures(
        ranking("1", responses, [[-10.0], [8.0]], "ann"), ranking("2", responses[::-1], [[10.0], [-9.0]], "ben")
    )
    assert one_row["alpha"] == two_rows["alpha"]
    assert (one_row["units"], one_row["judgements"]) == (two_rows["units"], two_rows["judgements"]) == (2, 4)
    # Observed: (2 * 1 + 2 * 4) / 4 = 2.5; expected: the mean of (a - b)² over the twelve ordered pairs.
    values = [-10, -9, 8, 10]
    expected = sum((one - other) ** 2 for one in values for other in values) / 12
    assert one_row["alpha"] == pytest.approx(1 - 2.5 / expected, abs=1e-4)


def test_length_bias_is_counted_over_pairs_with_a_preference() -> None:
    bias = figures(
        ranking("1", ["aaa", "b"], [1, 2]), ranking("2", ["a", "bbb", "cc"], [1, 2, 2]),
        ranking("3", ["a", "b"], [1, 2]), ranking("4", ["aa", "b"], [1, 1]),
    )  # fmt: skip
    assert (bias["pairs"], bias["longer_preferred"]) == (4, 0.3333)
    assert (bias["undecided"], bias["responses"]) == (1, {"2": 3, "3": 1})
    assert bias["rating_length_correlation"] is None
    rated_figures = figures(ranking("1", ["a", "bb", "ccc", "dddd"], [[-1.0], [2.0], [1.0, 2.0], [9.0]]))
    assert rated_figures["longer_preferred"] == pytest.approx(5 / 6, abs=1e-4)
    r = np.corrcoef([1, 2, 3, 4], [-1, 2, 1.5, 9])[0, 1]
    assert rated_figures["rating_length_correlation"] == pytest.approx(r, abs=1e-4)


def test_sources_and_scales_are_not_mixed() -> None:
    statistics = JudgementStatistics()
    statistics.add(ranking("1", ["a", "b"], [1, 2]))
    statistics.add(ranking("2", ["a", "b"], [[1.0], [2.0]]))
    statistics.add(ranking("3", ["a", "b"], [[1.0], [2.0]], scale=[1.0, 5.0]))
    statistics.add(ranking("4", ["a", "b"], [1, 2], source="puns"))
    assert {source: list(kinds) for source, kinds in statistics.figures().items()} == {
        "jokes": ["ranks", "scores -10 to 10", "scores 1 to 5"], "puns": ["ranks"]
    }  # fmt: skip


# The stage


def make_rankings(count: int) -> list[dict[str, Any]]:
    """Return rankings of pairs by three named annotators and an unnamed one, and scores of several raters."""
    people, orders = ("ann", "ben", "cat", None), ([1, 2], [1, 2], [2, 1])
    ranked = [
        ranking(f"{number:04}", [f"joke {number // 4}", f"long joke {number // 4}"], orders[number % 3], by)
        for number, by in zip(range(count), cycle(people), strict=False)
    ]
    return ranked + [
        ranking(f"s{number:04}", [f"pun {number}", f"no pun {number}"], [[number % 7, 1.5, -2.0], [3.0, 0.1]])
        for number in range(count)
    ]


def test_batch_size_does_not_change_the_result(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    results = []
    for turn, batch_rows in (("one", 2500), ("two", 7)):
        monkeypatch.setattr(tables, "ROWS_PER_GROUP", batch_rows)
        results.append((run(make_rankings(60), tmp_path / turn), tree_hash(tmp_path / turn / "out" / "report")))
    assert results[0] == results[1]
    assert results[0][0]["rankings"]["jokes"]["ranks"]["judgements"] == 45


def test_checking_rankings_does_not_keep_texts_in_memory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 5)
    text, count = "word" * 5_000, 300
    rows = (ranking(f"{n:016x}", [f"a {n} {text}", f"b {n} {text}"], [1, 2], f"person {n % 7}") for n in range(count))
    tables.write(rows, tmp_path / "in", tables.schema("rankings"))
    config = validate_config(max_message_characters=50_000)
    statistics = JudgementStatistics()
    tracemalloc.start()
    try:
        table_filter = Curator(config.curate).make_table_filter("rankings")
        checked = validate.check_table("rankings", tmp_path / "in", config, table_filter)
        for batch in tables.batches(tmp_path / "in"):
            for row in batch.to_pylist():
                statistics.add(row)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert checked.reasons == [None] * count
    assert peak < count * 2 * len(text) / 3


def test_the_report_shows_the_figures_and_escapes_texts(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pair = [SCRIPT, f"A longer joke with {SCRIPT}"]
    prompt: dict[str, Any] = {"prompt": [{"role": "user", "content": f"Tell {SCRIPT}"}]}
    rows = [
        ranking("1", pair, [2, 1], "ann", **prompt), ranking("2", pair, [2, 1], "ben", **prompt),
        ranking("3", ["a", "b", f"c {SCRIPT}", "d"], [1, 2, 3, 3], **prompt), ranking("4", [SCRIPT], [1], **prompt),
    ]  # fmt: skip
    metrics = run(rows, tmp_path)
    page = (tmp_path / "out/report/index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Judgements of the rankings" in page
    assert '<td class="number strong">1.00</td>\n<td class="soft name">reliable</td>' in page
    assert '<th class="number">4 responses</th>' in page
    summaries = json.loads((tmp_path / "out/report/validation.json").read_text(encoding="utf-8"))
    assert summaries[2]["judgements"] == metrics["rankings"]
    markdown = (tmp_path / "out/report/validation.md").read_text(encoding="utf-8")
    assert "| jokes | ranks | 3 | 1.00 | 50.0% | – |" in markdown
    assert "<script" not in markdown


def test_a_report_without_rankings_has_no_section_on_them() -> None:
    assert "Judgements of the rankings" not in report.render_page([], {})
    assert "judgements" not in report.render_markdown([], {})
