"""The page of samples: each reply beside the others' to the same question, shown as text, whatever it holds."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tasks.common.evaluation import samples
from tests.browser_fixtures import browser, page

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["browser", "page"]

MODELS = ("base", "tuned", "policy", "int8")
JUDGED = ("policy", "int8")


def answer(name: str, reply: str, **changes: Any) -> dict[str, Any]:
    """Return a row of the sheet: right and greedy unless it says otherwise."""
    row: dict[str, Any] = {
        "id": name, "entity": "France", "split": "heldout", "kind": "greedy", "question": f"Question {name}?",
        "reply": reply, "given": None, "wanted": "Paris", "correct": True, "reward": None, "judged": None,
    }  # fmt: skip
    return {**row, **changes}


def sampled(name: str, reply: str, reward: float, judged: float | None, **changes: Any) -> dict[str, Any]:
    """Return a row of a sampled reply."""
    return answer(name, reply, kind="sampled", correct=None, reward=reward, judged=judged, **changes)


def figures(*names: str) -> list[dict[str, Any]]:
    """Return the models' rows of the joined sheet."""
    return [
        {"model": name, "exact_match_heldout": 0.9, "reward_mean": -0.5, "win_rate_over_tuned": None} for name in names
    ]


def sheets(**changes: Any) -> dict[str, Any]:
    """Return four models' answers: `a` was sampled too, `b` turned wrong after tuning, `c` is alike for all."""
    found = {
        model: [
            answer("a", f"greedy of {model}", correct=model != "base"),
            answer("b", f"turning of {model}", split="train", correct=model == "tuned"),
            answer("c", f"alike in {model}", correct=True),
            sampled("a", f"sampled of {model}", place, (0.5, 1.0, 2.0, 1.0)[place]),
        ]
        for place, model in enumerate(MODELS)
    }
    return {**found, **changes}


class Reader(HTMLParser):
    """Reads the table of samples: the text of every cell, row by row, and which tags there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Begin a row or a cell."""
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        """End a cell."""
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        """Add to the cell that is open."""
        if self._open:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())


def read(answers: dict[str, Any], *names: str) -> Reader:
    """Return the page of these answers as read."""
    return Reader(samples.page(figures(*(names or MODELS)), answers, JUDGED))


def test_replies_to_a_question_stand_side_by_side() -> None:
    """Question, reference and side, then a cell a model: verdict, reply, sampled reply, reward, judge's preference."""
    heads, first, second = read(sheets()).rows
    assert [head.partition(" ")[0] for head in heads] == ["question", *MODELS]
    assert heads[1] == "base 90.0 % right, held out reward −0.50"
    assert first == [
        "Question a? answer: Paris held-out entity",
        "base ✗ greedy of base sampled of base reward 0.00 judge +0.50",
        "tuned ✓ greedy of tuned sampled of tuned reward +1.00 judge +1.00",
        "policy ✓ greedy of policy sampled of policy reward +2.00 judge +2.00 preferred to tuned",
        "int8 ✓ greedy of int8 sampled of int8 reward +3.00 judge +1.00 as good as tuned",
    ]
    assert second[0] == "Question b? answer: Paris tuned entity"
    assert [cell.split()[1] for cell in second[1:]] == ["✗", "✓", "✗", "✗"]


def test_questions_that_all_answered_alike_are_told_not_shown() -> None:
    """Of three, one was sampled and one turned; the base model's errors alone do not make a row."""
    text = samples.page(figures(*MODELS), sheets(), JUDGED)
    assert "alike in" not in text
    assert "2 of the 3 questions of the sheet" in text


def test_a_reply_that_the_tuned_model_wins_is_marked_and_found() -> None:
    """The row's marks are what the page filters by: the policy's verdict, not another model's."""
    worse = sheets(policy=[answer("a", "p"), sampled("a", "q", 0.0, 0.9)])
    text = samples.page(figures(*MODELS), worse, JUDGED)
    assert "tuned preferred" in text
    assert re.search(r'id="q-a" data-of="heldout lost"', text)
    assert re.search(r'id="q-b" data-of="train turned"', text)


def test_several_sampled_replies_are_judged_in_their_order() -> None:
    """The first against the tuned model's first; one without a counterpart is not judged."""
    rows = {
        "tuned": [sampled("a", "t1", 0.0, 1.0), sampled("a", "t2", 0.0, -1.0)],
        "policy": [sampled("a", "p1", 0.0, 0.0), sampled("a", "p2", 0.0, 0.0), sampled("a", "p3", 0.0, 0.0)],
    }
    cell = read(rows, "tuned", "policy").rows[1][2]
    assert re.findall(r"(p\d) reward \S+ judge \S+ ?(tuned preferred|preferred to tuned)?", cell) == [
        ("p1", "tuned preferred"), ("p2", "preferred to tuned"), ("p3", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["question", "reply", "wanted", "id"])
def test_what_a_text_holds_is_never_markup(place: str) -> None:
    """Not as a script, not as a tag, not out of an attribute; it stands there to be read."""
    hostile = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>"
    rows = {name: [answer("a", "r"), sampled("a", "r", 0.0, 0.0)] for name in MODELS}
    rows["policy"] = [{**row, place: hostile} for row in rows["policy"]]
    if place != "reply":
        rows = {name: [{**row, place: hostile} for row in found] for name, found in rows.items()}
    text = samples.page(figures(*MODELS), rows, JUDGED)
    assert text.count("<script>") == 1  # the page's own
    assert "img" not in Reader(text).tags
    assert "&lt;script&gt;alert(1)" in text


def test_what_a_browser_would_obey_is_left_out() -> None:
    """Control characters become blanks; line breaks stay."""
    cell = samples.page(figures("tuned"), {"tuned": [sampled("a", "one\x1b[2J\ntwo\u202e", 0.0, 0.0)]}, JUDGED)
    assert "one [2J\ntwo </bdi>" in cell


def test_a_model_without_replies_is_named_and_has_no_column() -> None:
    """Without the tuned model nothing is preferred to it; a question that one model was not asked says so."""
    answers = sheets(tuned=[], int8=[answer("b", "only b", split="train")])
    text = samples.page(figures(*MODELS), answers, JUDGED)
    assert "No replies of tuned were found: it has no column." in text
    heads, first, second = Reader(text).rows
    assert [head.partition(" ")[0] for head in heads] == ["question", "base", "policy", "int8"]
    assert "preferred" not in " ".join(first)
    assert first[3] == "int8 not asked"
    assert second[3] == "int8 ✓ only b"


def test_without_any_replies_there_is_a_sentence() -> None:
    assert "No model of this run has answered the sheet." in samples.page(figures(*MODELS), {}, JUDGED)


def test_a_page_is_the_same_whatever_the_order_of_its_rows() -> None:
    """Its bytes are tracked."""
    turned = {model: rows[::-1] for model, rows in sheets().items()}
    assert samples.page(figures(*MODELS), turned, JUDGED) == samples.page(figures(*MODELS), sheets(), JUDGED)


def test_a_reader_filters_by_word_and_by_verdict(page: "Page", tmp_path: Path) -> None:
    """In a browser, under the page's own policy, at a phone's width without scrolling sideways."""
    path = tmp_path / "samples.html"
    path.write_text(samples.page(figures(*MODELS), sheets(), JUDGED), encoding="utf-8")
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(path.as_uri())
    shown = page.locator("#samples tbody tr:visible")
    assert shown.count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_label("Show").select_option("turned")
    assert shown.evaluate_all("rows => rows.map((row) => row.id)") == ["q-b"]
    page.get_by_label("Show").select_option("")
    page.get_by_label("Search").fill("SAMPLED OF")
    assert shown.evaluate_all("rows => rows.map((row) => row.id)") == ["q-a"]
    assert page.locator("#shown").inner_text() == "1 of 2 shown"
    page.get_by_label("Search").fill("nothing like it")
    assert shown.count() == 0
    assert page.locator("#none").is_visible()


def test_replies_are_there_without_a_script(browser: Any, tmp_path: Path) -> None:
    """The script only filters."""
    path = tmp_path / "samples.html"
    path.write_text(samples.page(figures(*MODELS), sheets(), JUDGED), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    found = context.new_page()
    found.goto(path.as_uri())
    assert found.locator("#samples tbody tr").count() == 2
    assert not found.locator("#filter").is_visible()
    context.close()
