"""The ranking page in a real browser: from the first prompt through keyboard and pointer to the stored row."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from serving.feedback import Store
from tests.browser_fixtures import browser, page
from tests.page_fixtures import OTHER, SCRIPT, address, begin, folder, heard, order, saved, slide, store, texts
from tests.serving_fixtures import TAG, package, question

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

__all__ = ["address", "browser", "folder", "package", "page", "store"]


def test_keyboard_alone_from_the_first_prompt_to_the_stored_row(page: "Page", address: str, store: Store) -> None:
    page.goto(f"{address}/rank")
    page.locator("#nothing", has_text="No questions wait").wait_for()
    slide(page, 1.5)
    page.locator("#own-question").focus()
    page.keyboard.type(question("France"))
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".card").first.wait_for()
    one, two, three, four = texts(page)
    page.keyboard.press("Shift+ArrowDown")  # the first card has the focus: two, one, three, four
    page.keyboard.press("Shift+ArrowDown")  # two, three, one, four
    page.keyboard.press("ArrowDown")
    page.keyboard.press("=")  # two, three, one = four
    assert re.search(r"place 3 of 3, tied with A", page.inner_text("#status"))
    assert texts(page) == [two, three, one, four]
    page.keyboard.press("Control+Enter")
    row = saved(page, store)
    assert order(row) == [{two}, {three}, {one, four}]
    assert row.prompt == [{"role": "user", "content": question("France")}]
    assert set(row.models) <= {TAG, OTHER}
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


def test_dragging_orders_and_ties(page: "Page", address: str, store: Store) -> None:
    begin(page, address, question("Italy"))
    one, two, three, four = texts(page)
    drag(page, 3, 0, 0.05)
    assert texts(page) == [four, one, two, three]
    drag(page, 0, 2, 0.5)
    assert texts(page) == [one, two, four, three]
    page.click("#save")
    assert order(saved(page, store)) == [{one}, {two, four}, {three}]


def test_an_order_that_nobody_touched_is_asked_about_and_no_double_click_passes(
    page: "Page", address: str, store: Store
) -> None:
    before = len(store.rankings())
    begin(page, address, question("Japan"))
    shown = texts(page)
    page.dblclick("#save")
    page.locator("#untouched", has_text="Nothing was moved").wait_for()
    assert len(store.rankings()) == before
    page.click("#keep")
    assert order(saved(page, store)) == [{text} for text in shown]
    assert len(store.rankings()) == before + 1


def test_keys_ask_about_an_untouched_order_and_save_it_only_after_a_moment(
    page: "Page", address: str, store: Store
) -> None:
    page.clock.install(time="2026-01-01T12:00:00")
    before = len(store.rankings())
    begin(page, address, question("Japan"))
    page.clock.pause_at("2026-01-01T15:00:00")  # from here on the page's time is moved by this test alone
    for _ in range(3):
        page.keyboard.press("Control+Enter")
    page.locator("#keep:disabled").wait_for()
    page.clock.run_for(2000)
    page.locator("#keep:enabled").wait_for()
    assert len(store.rankings()) == before
    page.keyboard.press("Control+Enter")
    saved(page, store)
    assert len(store.rankings()) == before + 1


def test_a_move_answers_the_question_about_an_untouched_order(page: "Page", address: str) -> None:
    begin(page, address, question("Japan"))
    page.click("#save")
    page.locator("#untouched").wait_for()
    page.locator(".card").first.press("Shift+ArrowDown")
    assert page.locator("#untouched").is_hidden()


def test_the_keys_that_save_flag_where_the_flag_dialog_is_open(page: "Page", address: str, store: Store) -> None:
    rankings, opinions = len(store.rankings()), len(store.opinions())
    begin(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.get_by_role("button", name="Flag answer A").click()
    page.locator("#flag-note").press_sequentially("rude")
    page.keyboard.down("Control")
    page.keyboard.down("Enter")
    page.keyboard.down("Enter")  # held: with the dialog gone, it must not reach the page behind
    page.keyboard.up("Enter")
    page.keyboard.up("Control")
    page.locator("#status", has_text="Flagged").wait_for()
    assert [one.note for one in store.opinions()[opinions:]] == ["rude"]
    assert len(store.rankings()) == rankings
    assert page.locator(".card:visible").count() == 4


def test_undo_brings_the_last_one_back_with_its_order(page: "Page", address: str, store: Store) -> None:
    begin(page, address, question("Japan"))
    page.keyboard.press("Shift+ArrowDown")
    shown = texts(page)
    page.click("#save")
    first = saved(page, store)
    page.click("#undo")
    page.locator("#status", has_text="Taken back").wait_for()
    assert texts(page) == shown
    assert first.id not in [row.id for row in store.rankings()]
    assert page.inner_text("#session") == "0"
    page.click("#save")
    again = saved(page, store)
    assert (again.responses, again.ranks) == (first.responses, first.ranks)
    assert again.number > first.number


def test_undo_shows_a_flagged_answer_flagged(page: "Page", address: str, store: Store) -> None:
    begin(page, address, question("Japan"))
    page.keyboard.press("Shift+ArrowDown")
    page.get_by_role("button", name="Flag answer B").click()
    page.get_by_role("button", name="Flag it").click()
    page.locator("#status", has_text="Flagged").wait_for()
    page.click("#save")
    saved(page, store)
    page.click("#undo")
    page.locator("#status", has_text="Taken back").wait_for()
    flags = page.locator("[aria-label^='Flag answer']")
    pressed = {flag.get_attribute("aria-label"): flag.get_attribute("aria-pressed") for flag in flags.all()}
    assert pressed == {f"Flag answer {letter}": str(letter == "B").lower() for letter in "ABCD"}


def test_given_questions_wait_are_skipped_and_ranked(page: "Page", address: str, store: Store, folder: Path) -> None:
    (folder / "questions.txt").write_text(f"{question('New Zealand')}\n{SCRIPT}\n", encoding="utf-8")
    try:
        page.add_init_script("localStorage.setItem('bessemer.ranking', JSON.stringify({temperature: '1.5'}))")
        begin(page, address)
        assert page.inner_text("#queue").endswith("2 of 2")
        first = page.inner_text("#question")
        page.click("#skip")
        page.locator("#question", has_text=first).wait_for(state="hidden")
        page.locator(".card").first.wait_for()
        assert {first, page.inner_text("#question")} == {question("New Zealand"), SCRIPT}
        page.keyboard.press("=")
        page.click("#save")
        saved(page, store)
        page.locator("#nothing", has_text="You have been through all questions").wait_for()
        assert page.inner_text("#queue").endswith("1 of 2")
    finally:
        (folder / "questions.txt").unlink()


def test_a_question_that_cannot_be_ranked_is_shown_with_the_reason_and_skipped(
    page: "Page", address: str, folder: Path
) -> None:
    long = "Why? " * 200
    (folder / "questions.txt").write_text(long, encoding="utf-8")
    try:
        page.goto(f"{address}/rank")
        page.locator("#refusal", has_text="too long").wait_for()
        assert page.inner_text("#question").strip() == long.strip()
        assert page.locator("#save").is_hidden()
        assert page.locator(".card:visible").count() == 0
        page.click("#again")
        page.locator("#refusal", has_text="too long").wait_for()
        assert page.locator("#draw").is_visible()
        page.click("#skip")
        page.locator("#nothing", has_text="You have been through all questions").wait_for()
        page.reload()
        page.locator("#nothing", has_text="You have been through all questions").wait_for()
    finally:
        (folder / "questions.txt").unlink()


def rewrite(page: "Page", text: str) -> None:
    """Have answers drawn that say this text and their number, in place of what a tiny model makes up."""

    def replace(route: "Route") -> None:
        reply = route.fetch()
        content = reply.json()
        content["answers"] = [{**one, "text": f"{text} {at}"} for at, one in enumerate(content["answers"], 1)]
        route.fulfill(response=reply, json=content)

    page.route("**/feedback/samples", replace)


def test_a_card_reads_its_answer_to_a_screen_reader(page: "Page", address: str) -> None:
    rewrite(page, "Reply")
    begin(page, address, question("France"))
    cards = [(node.name, node.description) for node in heard(page) if node.role == "group" and ": place" in node.name]
    assert cards == [(f"Answer {letter}: place {at} of 4", f"Reply {at}") for at, letter in enumerate("ABCD", 1)]


def test_scripts_in_prompts_and_replies_are_text(page: "Page", address: str) -> None:
    rewrite(page, SCRIPT)
    begin(page, address, f"{question('France')} {SCRIPT}")
    assert page.inner_text("#question") == f"{question('France')} {SCRIPT}"
    assert texts(page)[0].startswith(SCRIPT)
    assert page.locator("main img, main b, main script").count() == 0
