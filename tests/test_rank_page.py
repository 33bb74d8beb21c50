"""The ranking page in a real browser: keyboard, pointer, undo, skip, and the stored row."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from serving.feedback.store import Store
from tests.browser_fixtures import browser, page
from tests.page_fixtures import (
    OTHER_TAG,
    SCRIPT,
    accessibility_tree,
    address,
    answer_texts,
    folder,
    open_ranking,
    ranked_texts,
    set_temperature,
    store,
    wait_for_saved,
)
from tests.serving_fixtures import TAG, package, question

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

__all__ = ["address", "browser", "folder", "package", "page", "store"]


def test_keyboard_only_ranking_is_stored(page: "Page", address: str, store: Store) -> None:
    page.goto(f"{address}/rank")
    page.locator("#nothing", has_text="No questions are waiting").wait_for()
    set_temperature(page, 1.5)
    page.locator("#own-question").focus()
    page.keyboard.type(question("France"))
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".card").first.wait_for()
    one, two, three, four = answer_texts(page)
    page.keyboard.press("Shift+ArrowDown")  # the first card has the focus: two, one, three, four
    page.keyboard.press("Shift+ArrowDown")  # two, three, one, four
    page.keyboard.press("ArrowDown")
    page.keyboard.press("=")  # two, three, one = four
    assert re.search(r"place 3 of 3, tied with A", page.inner_text("#status"))
    assert answer_texts(page) == [two, three, one, four]
    page.keyboard.press("Control+Enter")
    row = wait_for_saved(page, store)
    assert ranked_texts(row) == [{two}, {three}, {one, four}]
    assert row.prompt == [{"role": "user", "content": question("France")}]
    assert set(row.models) <= {TAG, OTHER_TAG}
    assert len(set(row.models)) == 2
    assert page.inner_text("#session") == "1"


def drag(page: "Page", card: int, onto: int, part: float) -> None:
    """Drag a card by its handle to a part of another one's height."""
    grip = page.locator(".grip").nth(card).bounding_box()
    box = page.locator(".card").nth(onto).bounding_box()
    assert grip is not None
    assert box is not None
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 20, box["y"] + box["height"] / 2, steps=4)
    page.mouse.move(box["x"] + 20, box["y"] + box["height"] * part, steps=4)
    page.mouse.up()


def test_drag_sets_order_and_ties(page: "Page", address: str, store: Store) -> None:
    open_ranking(page, address, question("Italy"))
    one, two, three, four = answer_texts(page)
    drag(page, 3, 0, 0.05)
    assert answer_texts(page) == [four, one, two, three]
    drag(page, 0, 2, 0.5)
    assert answer_texts(page) == [one, two, four, three]
    page.click("#save")
    assert ranked_texts(wait_for_saved(page, store)) == [{one}, {two, four}, {three}]


def test_untouched_order_asks_for_confirmation_and_ignores_double_click(
    page: "Page", address: str, store: Store
) -> None:
    before = len(store.rankings())
    open_ranking(page, address, question("Japan"))
    answers = answer_texts(page)
    page.dblclick("#save")
    page.locator("#untouched", has_text="Nothing was moved").wait_for()
    assert len(store.rankings()) == before
    page.click("#keep")
    assert ranked_texts(wait_for_saved(page, store)) == [{text} for text in answers]
    assert len(store.rankings()) == before + 1


def test_untouched_order_is_saved_by_keyboard_only_after_a_delay(page: "Page", address: str, store: Store) -> None:
    page.clock.install(time="2026-01-01T12:00:00")
    before = len(store.rankings())
    open_ranking(page, address, question("Japan"))
    page.clock.pause_at("2026-01-01T15:00:00")  # from here on only this test advances the page's clock
    for _ in range(3):
        page.keyboard.press("Control+Enter")
    page.locator("#keep:disabled").wait_for()
    page.clock.run_for(2000)
    page.locator("#keep:enabled").wait_for()
    assert len(store.rankings()) == before
    page.keyboard.press("Control+Enter")
    wait_for_saved(page, store)
    assert len(store.rankings()) == before + 1


def test_move_closes_the_untouched_order_confirmation(page: "Page", address: str) -> None:
    open_ranking(page, address, question("Japan"))
    page.click("#save")
    page.locator("#untouched").wait_for()
    page.locator(".card").first.press("Shift+ArrowDown")
    assert page.locator("#untouched").is_hidden()


def test_ctrl_enter_submits_the_open_flag_dialog(page: "Page", address: str, store: Store) -> None:
    rankings, opinions = len(store.rankings()), len(store.opinions())
    open_ranking(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.get_by_role("button", name="Flag answer A").click()
    page.locator("#flag-note").press_sequentially("rude")
    page.keyboard.down("Control")
    page.keyboard.down("Enter")
    page.keyboard.down("Enter")  # key repeat: after the dialog closed, it must not reach the page behind
    page.keyboard.up("Enter")
    page.keyboard.up("Control")
    page.locator("#status", has_text="Flagged").wait_for()
    assert [one.note for one in store.opinions()[opinions:]] == ["rude"]
    assert len(store.rankings()) == rankings
    assert page.locator(".card:visible").count() == 4


def test_undo_restores_the_last_ranking_with_its_order(page: "Page", address: str, store: Store) -> None:
    open_ranking(page, address, question("Japan"))
    page.keyboard.press("Shift+ArrowDown")
    answers = answer_texts(page)
    page.click("#save")
    first = wait_for_saved(page, store)
    page.click("#undo")
    page.locator("#status", has_text="Taken back").wait_for()
    assert answer_texts(page) == answers
    assert first.id not in [row.id for row in store.rankings()]
    assert page.inner_text("#session") == "0"
    page.click("#save")
    again = wait_for_saved(page, store)
    assert (again.responses, again.ranks) == (first.responses, first.ranks)
    assert again.number > first.number


def test_undo_shows_a_flagged_answer_flagged(page: "Page", address: str, store: Store) -> None:
    open_ranking(page, address, question("Japan"))
    page.keyboard.press("Shift+ArrowDown")
    page.get_by_role("button", name="Flag answer B").click()
    page.get_by_role("button", name="Flag it").click()
    page.locator("#status", has_text="Flagged").wait_for()
    page.click("#save")
    wait_for_saved(page, store)
    page.click("#undo")
    page.locator("#status", has_text="Taken back").wait_for()
    flags = page.locator("[aria-label^='Flag answer']")
    pressed_by_label = {flag.get_attribute("aria-label"): flag.get_attribute("aria-pressed") for flag in flags.all()}
    assert pressed_by_label == {f"Flag answer {letter}": str(letter == "B").lower() for letter in "ABCD"}


def test_queued_questions_are_ranked_and_skipped(page: "Page", address: str, store: Store, folder: Path) -> None:
    (folder / "questions.txt").write_text(f"{question('New Zealand')}\n{SCRIPT}\n", encoding="utf-8")
    try:
        page.add_init_script("localStorage.setItem('bessemer.ranking', JSON.stringify({temperature: '1.5'}))")
        open_ranking(page, address)
        assert page.inner_text("#queue").endswith("2 of 2")
        first = page.inner_text("#question")
        page.click("#skip")
        page.locator("#question", has_text=first).wait_for(state="hidden")
        page.locator(".card").first.wait_for()
        assert {first, page.inner_text("#question")} == {question("New Zealand"), SCRIPT}
        page.keyboard.press("=")
        page.click("#save")
        wait_for_saved(page, store)
        page.locator("#nothing", has_text="You have ranked or skipped all questions").wait_for()
        assert page.inner_text("#queue").endswith("1 of 2")
    finally:
        (folder / "questions.txt").unlink()


def test_unrankable_question_shows_the_reason_and_can_be_skipped(page: "Page", address: str, folder: Path) -> None:
    long = "Why? " * 200
    (folder / "questions.txt").write_text(long, encoding="utf-8")
    try:
        page.goto(f"{address}/rank")
        page.locator("#refusal", has_text="too long").wait_for()
        page.click("text=Show the whole question")
        assert page.inner_text("#question").strip() == long.strip()
        assert page.locator("#save").is_hidden()
        assert page.locator(".card:visible").count() == 0
        page.click("#again")
        page.locator("#refusal", has_text="too long").wait_for()
        assert page.locator("#draw").is_visible()
        page.click("#skip")
        page.locator("#nothing", has_text="You have ranked or skipped all questions").wait_for()
        page.reload()
        page.locator("#nothing", has_text="You have ranked or skipped all questions").wait_for()
    finally:
        (folder / "questions.txt").unlink()


def replace_answers(page: "Page", text: str) -> None:
    """Replace the sampled answers by this text and their number."""

    def replace(route: "Route") -> None:
        reply = route.fetch()
        content = reply.json()
        content["answers"] = [{**one, "text": f"{text} {at}"} for at, one in enumerate(content["answers"], 1)]
        route.fulfill(response=reply, json=content)

    page.route("**/feedback/samples", replace)


def test_card_exposes_its_answer_to_screen_readers(page: "Page", address: str) -> None:
    replace_answers(page, "Reply")
    open_ranking(page, address, question("France"))
    cards = [
        (node.name, node.description)
        for node in accessibility_tree(page)
        if node.role == "group" and ": place" in node.name
    ]
    assert cards == [(f"Answer {letter}: place {at} of 4", f"Reply {at}") for at, letter in enumerate("ABCD", 1)]


def test_scripts_in_prompts_and_replies_are_escaped(page: "Page", address: str) -> None:
    replace_answers(page, SCRIPT)
    open_ranking(page, address, f"{question('France')} {SCRIPT}")
    assert page.inner_text("#question") == f"{question('France')} {SCRIPT}"
    assert answer_texts(page)[0].startswith(SCRIPT)
    assert page.locator("main img, main b, main script").count() == 0
