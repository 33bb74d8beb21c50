"""The samples page: all models' replies to a question side by side, with all text escaped."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tasks.compare import samples
from tests.browser_fixtures import browser, page

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["browser", "page"]

MODELS = ("base", "tuned", "policy", "int8")
MAKERS = {"base": "pretrain@a", "tuned": "finetune@b", "policy": "align@c", "int8": "quantize@d"}


def answer(name: str, reply: str, **changes: Any) -> dict[str, Any]:
    """Return an answer row, by default a correct greedy one."""
    row: dict[str, Any] = {
        "id": name, "entity": "France", "split": "heldout", "kind": "greedy", "question": f"Question {name}?",
        "reply": reply, "extracted": None, "reference": "Paris", "correct": True, "reward": None, "judge_score": None,
    }  # fmt: skip
    return {**row, **changes}


def sampled(name: str, reply: str, reward: float, judge_score: float | None, **changes: Any) -> dict[str, Any]:
    """Return a row of a sampled reply."""
    return answer(name, reply, kind="sampled", correct=None, reward=reward, judge_score=judge_score, **changes)


def figures(*names: str) -> list[dict[str, Any]]:
    """Return the models' rows of the scorecard."""
    return [
        {"model": name, "made_by": MAKERS[name], "against": "tuned" if name in ("policy", "int8") else None,
         "exact_match_heldout": 0.9, "reward_mean": -0.5, "win_rate": None}
        for name in names
    ]  # fmt: skip


def all_answers(**changes: Any) -> dict[str, Any]:
    """Return four models' answers: `a` was also sampled, `b` became wrong after fine-tuning, `c` is equal for all."""
    answers_by_model = {
        model: [
            answer("a", f"greedy of {model}", correct=model != "base"),
            answer("b", f"turning of {model}", split="train", correct=model == "tuned"),
            answer("c", f"alike in {model}", correct=True),
            sampled("a", f"sampled of {model}", place, (0.5, 1.0, 2.0, 1.0)[place]),
        ]
        for place, model in enumerate(MODELS)
    }
    return {**answers_by_model, **changes}


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


def read_page(answers: dict[str, Any], *names: str) -> Reader:
    """Return the page of these answers as read."""
    return Reader(samples.page(figures(*(names or MODELS)), answers))


def test_replies_to_a_question_are_in_one_row() -> None:
    """Question, reference and split, then a cell per model: verdict, reply, sampled reply, reward, preference."""
    heads, first, second = read_page(all_answers()).rows
    assert [head.partition(" ")[0] for head in heads] == ["question", *MODELS]
    assert heads[1] == "base 90.0 % right, held out reward −0.50"
    assert first == [
        "Question a? answer: Paris held-out entity",
        "base ✗ greedy of base sampled of base reward 0.00 judge +0.50",
        "tuned ✓ greedy of tuned sampled of tuned reward +1.00 judge +1.00",
        "policy ✓ greedy of policy sampled of policy reward +2.00 judge +2.00 preferred to tuned",
        "int8 ✓ greedy of int8 sampled of int8 reward +3.00 judge +1.00 as good as tuned",
    ]
    assert second[0] == "Question b? answer: Paris seen entity"
    assert [cell.split()[1] for cell in second[1:]] == ["✗", "✓", "✗", "✗"]


def test_questions_with_equal_verdicts_are_counted_not_shown() -> None:
    """Of three, one was sampled and one changed its verdict; the base model's errors do not count."""
    text = samples.page(figures(*MODELS), all_answers())
    assert "alike in" not in text
    assert "2 of the 3 questions of the scorecard" in text


def test_lost_comparison_is_marked_for_the_filter() -> None:
    """The row's `data-of` has the judge's verdict on the aligned model, not on others."""
    worse = all_answers(policy=[answer("a", "p"), sampled("a", "q", 0.0, 0.9)])
    text = samples.page(figures(*MODELS), worse)
    assert re.search(r"not preferred to\s+tuned", text)
    assert re.search(r'id="q-a" data-of="heldout lost"', text)
    assert re.search(r'id="q-b" data-of="train changed"', text)


def test_several_sampled_replies_are_judged_in_their_order() -> None:
    """The first with the first of the model before; a reply without a counterpart is not compared."""
    rows = {
        "tuned": [sampled("a", "t1", 0.0, 1.0), sampled("a", "t2", 0.0, -1.0)],
        "policy": [sampled("a", "p1", 0.0, 0.0), sampled("a", "p2", 0.0, 0.0), sampled("a", "p3", 0.0, 0.0)],
    }
    cell = read_page(rows, "tuned", "policy").rows[1][2]
    assert re.findall(r"(p\d) reward \S+ judge \S+ ?(not preferred to tuned|preferred to tuned)?", cell) == [
        ("p1", "not preferred to tuned"), ("p2", "preferred to tuned"), ("p3", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["question", "reply", "reference", "id"])
def test_text_is_escaped(place: str) -> None:
    """It is shown as text and opens no script, tag or attribute."""
    hostile = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>"
    rows = {name: [answer("a", "r"), sampled("a", "r", 0.0, 0.0)] for name in MODELS}
    rows["policy"] = [{**row, place: hostile} for row in rows["policy"]]
    if place != "reply":
        rows = {name: [{**row, place: hostile} for row in model_rows] for name, model_rows in rows.items()}
    text = samples.page(figures(*MODELS), rows)
    assert text.count("<script>") == 1  # the page's own
    assert "img" not in Reader(text).tags
    assert "&lt;script&gt;alert(1)" in text


def test_control_characters_are_removed() -> None:
    """They become spaces; line breaks stay."""
    cell = samples.page(figures("tuned"), {"tuned": [sampled("a", "one\x1b[2J\ntwo\u202e", 0.0, 0.0)]})
    assert "one [2J\ntwo </bdi>" in cell


def test_a_model_without_replies_is_named_and_has_no_column() -> None:
    """No comparison with that model is shown; a question that a model was not asked is marked."""
    answers = all_answers(tuned=[], int8=[answer("b", "only b", split="train")])
    text = samples.page(figures(*MODELS), answers)
    assert "No replies of tuned were found: it has no column." in text
    heads, first, second = Reader(text).rows
    assert [head.partition(" ")[0] for head in heads] == ["question", "base", "policy", "int8"]
    assert "preferred" not in " ".join(first)
    assert first[3] == "int8 not asked"
    assert second[3] == "int8 ✓ only b"


def test_page_without_replies_has_a_message() -> None:
    assert "No model of this run has answered the questions." in samples.page(figures(*MODELS), {})


def test_page_is_independent_of_row_order() -> None:
    """DVC tracks its bytes."""
    reversed_rows = {model: rows[::-1] for model, rows in all_answers().items()}
    assert samples.page(figures(*MODELS), reversed_rows) == samples.page(figures(*MODELS), all_answers())


def test_filter_by_word_and_by_verdict(page: "Page", tmp_path: Path) -> None:
    """In a browser with the page's security policy, at a phone's width without horizontal scrolling."""
    path = tmp_path / "samples.html"
    path.write_text(samples.page(figures(*MODELS), all_answers()), encoding="utf-8")
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(path.as_uri())
    visible_rows = page.locator("#samples tbody tr:visible")
    assert visible_rows.count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_label("Show").select_option("changed")
    assert visible_rows.evaluate_all("rows => rows.map((row) => row.id)") == ["q-b"]
    page.get_by_label("Show").select_option("")
    page.get_by_label("Search").fill("SAMPLED OF")
    assert visible_rows.evaluate_all("rows => rows.map((row) => row.id)") == ["q-a"]
    assert page.locator("#shown").inner_text() == "1 of 2 shown"
    page.get_by_label("Search").fill("nothing like it")
    assert visible_rows.count() == 0
    assert page.locator("#none").is_visible()


def test_replies_are_shown_without_javascript(browser: Any, tmp_path: Path) -> None:
    """The script only filters."""
    path = tmp_path / "samples.html"
    path.write_text(samples.page(figures(*MODELS), all_answers()), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#samples tbody tr").count() == 2
    assert not page.locator("#filter").is_visible()
    context.close()
