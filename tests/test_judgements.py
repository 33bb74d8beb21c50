"""What validation says of the rankings: contradictions of one person, agreement of several, length bias, its page."""

import importlib
import json
import tracemalloc
import warnings
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import validate
from tasks.common import tables
from tasks.common.identity import tree_hash
from tasks.common.validation import report
from tasks.common.validation.curation import Curator
from tasks.common.validation.judgements import CONTRADICTION, Contradictions, Judgements
from tests.data_fixtures import job, table, validate_config

SCRIPT = "<script>alert(1)</script>"
DOCUMENT: dict[str, Any] = {
    "id": "d", "text": "A duck swims.", "names": [], "source": "s", "group": None, "licence": "MIT", "split": "train",
}  # fmt: skip
CHAT = {"id": "c", "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}],
        "entity": "e", "answer": None, "tone": None, "source": "s", "split": "train"}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def great_expectations() -> None:
    """Import the library once: while it is imported it uses deprecated modules of Python's own, not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("great_expectations")


def ranking(
    identifier: str, responses: list[str], judged: list[Any], by: str | None = None, **more: Any
) -> dict[str, Any]:
    """Return a ranking by ranks, or by scores from -10 to 10 where each response has a list of them."""
    rated = isinstance(judged[0], list)
    return {
        "id": identifier, "prompt": [{"role": "user", "content": "Tell a joke."}], "responses": responses,
        "ranks": None if rated else judged, "scores": judged if rated else None,
        "scale": [-10.0, 10.0] if rated else None, "annotators": 1, "annotator": by, "models": [], "source": "jokes",
        "split": "train", **more,
    }  # fmt: skip


def run(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    content = {"corpus": [DOCUMENT], "instructions": [CHAT], "rankings": rows}
    for name, found in content.items():
        tables.write(found, folder / "in" / name, tables.schema(name))
    inputs = {name: folder / "in" / name for name in tables.TABLES}
    return validate.run(validate_config(refused_share=0.9), job(validate, inputs, folder / "out"))


def refused(folder: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in table(folder / "out" / "refused", "rankings")}


def figures(*rows: dict[str, Any]) -> dict[str, Any]:
    judgements = Judgements()
    for row in rows:
        judgements.add(row)
    ((found,),) = (ways.values() for ways in judgements.figures().values())
    return found


# What one person says twice


def contradicting(*rows: dict[str, Any]) -> list[int]:
    found = Contradictions()
    for position, row in enumerate(rows):
        found.add(position, row)
    return found.settle()


def test_who_prefers_the_opposite_elsewhere_is_in_contradiction_and_both_rows_are_named() -> None:
    pair, swapped = ["Knock.", "A duck."], ["A duck.", "Knock."]
    assert contradicting(ranking("1", pair, [1, 2], "ann"), ranking("2", pair, [2, 1], "ann")) == [0, 1]
    assert contradicting(ranking("1", pair, [1, 2], "ann"), ranking("2", swapped, [1, 2], "ann")) == [0, 1]
    assert contradicting(ranking("1", pair, [1, 2], "ann"), ranking("2", swapped, [2, 1], "ann")) == []
    assert contradicting(ranking("1", pair, [[8.0], [-10.0]], "ann"), ranking("2", pair, [2, 1], "ann")) == [0, 1]
    of_three = ranking("2", ["Two ducks.", *swapped], [1, 1, 2], "ann")
    assert contradicting(of_three, ranking("1", pair, [1, 2], "ann"), ranking("3", ["x", "y"], [1, 2], "ann")) == [0, 1]


def test_a_tie_another_person_an_unnamed_one_or_another_prompt_is_no_contradiction() -> None:
    pair = ["Knock.", "A duck."]
    first = ranking("1", pair, [1, 2], "ann")
    other = {"prompt": [{"role": "user", "content": "Tell another."}]}
    assert contradicting() == []
    assert contradicting(first, ranking("2", pair, [1, 1], "ann")) == []
    assert contradicting(first, ranking("2", pair, [2, 1], "ben"), ranking("3", pair, [2, 1])) == []
    assert contradicting(first, ranking("2", pair, [2, 1], "ann", **other)) == []


def test_bad_rankings_are_kept_aside_with_the_reason_and_disagreement_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
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
    found = run(rows, tmp_path)
    assert refused(tmp_path) == {
        "again": "the same content came before",
        "one way": CONTRADICTION,
        "the other": CONTRADICTION,
        "repeated": "two of the responses are the same text",
        "single": "fewer than two distinct responses",
        "many": "the number of ranks is not the number of responses",
        "outside": "a score outside the scale",
    }
    kept = {row["id"]: row["responses"] for row in table(tmp_path / "out", "rankings")}
    assert set(kept) == {"ann", "ben", "cat", "nobody", "script"}
    assert kept["script"][0] == SCRIPT
    ranks = found["rankings"]["jokes"]["ranks"]
    assert (ranks["rankings"], ranks["annotators"], ranks["unnamed"]) == (5, 3, 2)
    assert (ranks["units"], ranks["judgements"]) == (1, 3)


# Figures


def test_people_who_prefer_the_same_agree_and_who_prefer_the_opposite_do_not() -> None:
    pair, other = ["Knock.", "A duck."], ["one", "two"]
    same = [ranking("1", pair, [1, 2], "ann"), ranking("2", pair[::-1], [2, 1], "ben")]
    assert figures(*same)["alpha"] == 1
    # In both orders there are two of each preference, at a squared distance of 4: 1 - 4 * 4 / (2 * 2 * 2 / 3 * 4).
    assert figures(same[0], ranking("2", pair, [2, 1], "ben"))["alpha"] == -0.5
    more = [ranking("3", other, [1, 2], "ann"), ranking("4", other, [2, 1], "ben")]
    assert figures(*same, *more)["alpha"] == pytest.approx(1 - 4 * 16 / (2 * 4 * 4 / 7 * 16), abs=1e-4)
    assert figures(same[0], ranking("2", pair, [1, 2]))["alpha"] is None, "who is not named may be anybody"
    again = ranking("5", [*pair, "x"], [1, 2, 3], "ann")
    assert figures(*same, again)["judgements"] == 2, "a person is asked once"


def test_scores_of_several_people_are_compared_wherever_they_stand() -> None:
    responses = ["Knock.", "A duck."]
    together = figures(ranking("1", responses, [[-10.0, -9.0], [8.0, 10.0]]))
    apart = figures(
        ranking("1", responses, [[-10.0], [8.0]], "ann"), ranking("2", responses[::-1], [[10.0], [-9.0]], "ben")
    )
    assert together["alpha"] == apart["alpha"]
    assert (together["units"], together["judgements"]) == (apart["units"], apart["judgements"]) == (2, 4)
    # Observed: (2 * 1 + 2 * 4) / 4 = 2.5; expected: the mean of (a - b)² over the twelve ordered pairs.
    values = [-10, -9, 8, 10]
    expected = sum((one - other) ** 2 for one in values for other in values) / 12
    assert together["alpha"] == pytest.approx(1 - 2.5 / expected, abs=1e-4)


def test_length_bias_is_counted_over_pairs_with_a_preference() -> None:
    found = figures(
        ranking("1", ["aaa", "b"], [1, 2]), ranking("2", ["a", "bbb", "cc"], [1, 2, 2]),
        ranking("3", ["a", "b"], [1, 2]), ranking("4", ["aa", "b"], [1, 1]),
    )  # fmt: skip
    assert (found["pairs"], found["longer_preferred"]) == (4, 0.3333)
    assert (found["undecided"], found["responses"]) == (1, {"2": 3, "3": 1})
    assert found["rating_length_correlation"] is None
    rated = figures(ranking("1", ["a", "bb", "ccc", "dddd"], [[-1.0], [2.0], [1.0, 2.0], [9.0]]))
    assert rated["longer_preferred"] == pytest.approx(5 / 6, abs=1e-4)
    r = np.corrcoef([1, 2, 3, 4], [-1, 2, 1.5, 9])[0, 1]
    assert rated["rating_length_correlation"] == pytest.approx(r, abs=1e-4)


def test_sources_and_scales_are_not_mixed() -> None:
    judgements = Judgements()
    judgements.add(ranking("1", ["a", "b"], [1, 2]))
    judgements.add(ranking("2", ["a", "b"], [[1.0], [2.0]]))
    judgements.add(ranking("3", ["a", "b"], [[1.0], [2.0]], scale=[1.0, 5.0]))
    judgements.add(ranking("4", ["a", "b"], [1, 2], source="puns"))
    assert {source: list(ways) for source, ways in judgements.figures().items()} == {
        "jokes": ["ranks", "scores -10 to 10", "scores 1 to 5"], "puns": ["ranks"]
    }  # fmt: skip


# The stage


def many(count: int) -> list[dict[str, Any]]:
    """Return rankings of pairs by three people who are named and one who is not, and scores by several."""
    people, orders = ("ann", "ben", "cat", None), ([1, 2], [1, 2], [2, 1])
    ranked = [
        ranking(f"{number:04}", [f"joke {number // 4}", f"long joke {number // 4}"], orders[number % 3], by)
        for number, by in zip(range(count), cycle(people), strict=False)
    ]
    return ranked + [
        ranking(f"s{number:04}", [f"pun {number}", f"no pun {number}"], [[number % 7, 1.5, -2.0], [3.0, 0.1]])
        for number in range(count)
    ]


def test_how_many_rows_are_read_at_once_decides_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for turn, at_once in (("one", 2500), ("two", 7)):
        monkeypatch.setattr(tables, "ROWS_PER_GROUP", at_once)
        found.append((run(many(60), tmp_path / turn), tree_hash(tmp_path / turn / "out" / "report")))
    assert found[0] == found[1]
    assert found[0][0]["rankings"]["jokes"]["ranks"]["judgements"] == 45


def test_texts_are_not_held_while_rankings_are_judged_and_counted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 5)
    text, count = "word" * 5_000, 300
    rows = (ranking(f"{n:016x}", [f"a {n} {text}", f"b {n} {text}"], [1, 2], f"person {n % 7}") for n in range(count))
    tables.write(rows, tmp_path / "in", tables.schema("rankings"))
    config = validate_config(message_characters=50_000)
    judgements = Judgements()
    tracemalloc.start()
    try:
        judged = validate.judge("rankings", tmp_path / "in", config, Curator(config.curate).look_at("rankings"))
        for batch in tables.batches(tmp_path / "in"):
            for row in batch.to_pylist():
                judgements.add(row)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert judged.reasons == [None] * count
    assert peak < count * 2 * len(text) / 3


def test_the_page_and_the_figures_show_what_was_measured_and_no_text_is_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pair = [SCRIPT, f"A longer joke with {SCRIPT}"]
    asked: dict[str, Any] = {"prompt": [{"role": "user", "content": f"Tell {SCRIPT}"}]}
    rows = [
        ranking("1", pair, [2, 1], "ann", **asked), ranking("2", pair, [2, 1], "ben", **asked),
        ranking("3", ["a", "b", f"c {SCRIPT}", "d"], [1, 2, 3, 3], **asked), ranking("4", [SCRIPT], [1], **asked),
    ]  # fmt: skip
    found = run(rows, tmp_path)
    page = (tmp_path / "out/report/index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "How the rankings were judged" in page
    assert '<td class="number strong">1.00</td><td class="soft name">reliable</td>' in page
    assert '<th class="number">4 responses</th>' in page
    told = json.loads((tmp_path / "out/report/validation.json").read_text(encoding="utf-8"))
    assert told[2]["judgements"] == found["rankings"]
    markdown = (tmp_path / "out/report/validation.md").read_text(encoding="utf-8")
    assert "| jokes | ranks | 3 | 1.00 | 50.0% | – |" in markdown
    assert "<script" not in markdown


def test_without_rankings_the_page_says_nothing_of_them() -> None:
    assert "How the rankings were judged" not in report.page([], {})
    assert "judged" not in report.markdown([], {})
