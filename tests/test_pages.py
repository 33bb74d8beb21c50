"""The pages in a real browser: from the first prompt through keyboard and pointer to the stored row."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serving.feedback import VARIABLE, Store
from serving.package import OTHERS
from tests.browser_fixtures import browser, page
from tests.servers import free_port, serving
from tests.serving_fixtures import TAG, answer, package, question

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

__all__ = ["browser", "package", "page"]

OTHER = "other-aaaaaaaaaaaa-bbbbbbbbbbbb"
SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)</script> <b>bold</b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback")


@pytest.fixture(scope="module")
def address(package: Path, folder: Path, browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with two models and no questions yet."""
    other = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(package / "policy", other / "policy")
    (other / "provenance.json").write_text(json.dumps({"model": OTHER, "stages": [{"stage": "finetune"}]}))
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        patch.setenv(OTHERS, json.dumps({"other": str(other)}))
        with serving("serving.serve", str(port), package=package, port=port, log=log):
            yield f"http://127.0.0.1:{port}"


@pytest.fixture
def store(folder: Path, address: str) -> Iterator[Store]:
    """The server's store, seen from outside."""
    opened = Store(folder)
    yield opened
    opened.close()


def begin(page: "Page", address: str, asked: str | None = None) -> None:
    """Open the ranking page and have answers drawn to a question of one's own; by default to the next that waits."""
    page.goto(f"{address}/rank")
    if asked is not None:
        page.locator("#nothing-text", has_text="No questions wait").wait_for()
        slide(page, 1.5)
        page.fill("#own-question", asked)
        page.click("text=Draw answers")
    page.locator(".card").first.wait_for()


def slide(page: "Page", temperature: float) -> None:
    page.locator("#temperature").fill(str(temperature))


def texts(page: "Page") -> list[str]:
    return page.locator(".card .text").all_inner_texts()


def saved(page: "Page", store: Store) -> Any:
    """Wait until the page says that a ranking is saved, and return the newest row."""
    page.locator("#status", has_text="Saved as ranking").wait_for()
    row = store.rankings()[-1]
    assert f"Saved as ranking {row.number}." in page.inner_text("#status")
    return row


def order(row: Any) -> list[set[str]]:
    """Return the responses of a row place by place."""
    pairs = list(zip(row.ranks, row.responses, strict=True))
    return [{text for rank, text in pairs if rank == place} for place in range(1, max(row.ranks) + 1)]


def test_keyboard_alone_from_the_first_prompt_to_the_stored_row(page: "Page", address: str, store: Store) -> None:
    page.goto(f"{address}/rank")
    page.locator("#nothing-text", has_text="No questions wait").wait_for()
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


def test_an_order_that_nobody_touched_is_asked_about_and_a_double_click_saves_once(
    page: "Page", address: str, store: Store
) -> None:
    before = len(store.rankings())
    begin(page, address, question("Japan"))
    page.click("#save")
    page.locator("#status", has_text="Nothing was moved").wait_for()
    assert len(store.rankings()) == before
    page.dblclick("#save")
    saved(page, store)
    assert len(store.rankings()) == before + 1


def test_undo_brings_the_last_one_back_with_its_order(page: "Page", address: str, store: Store) -> None:
    begin(page, address, question("Japan"))
    page.keyboard.press("Shift+ArrowDown")
    shown = texts(page)
    page.click("#save")
    first = saved(page, store)
    page.click("#undo-here")
    page.locator("#status", has_text="Taken back").wait_for()
    assert texts(page) == shown
    assert first.id not in [row.id for row in store.rankings()]
    assert page.inner_text("#session") == "0"
    page.click("#save")
    again = saved(page, store)
    assert (again.responses, again.ranks) == (first.responses, first.ranks)
    assert again.number > first.number


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
        page.locator("#nothing-text", has_text="You have been through all questions").wait_for()
        assert page.inner_text("#queue").endswith("1 of 2")
    finally:
        (folder / "questions.txt").unlink()


def test_scripts_in_prompts_and_replies_are_text(page: "Page", address: str, store: Store) -> None:
    def replace(route: "Route") -> None:
        reply = route.fetch()
        content = reply.json()
        content["answers"] = [{**one, "text": f"{SCRIPT} {at}"} for at, one in enumerate(content["answers"])]
        route.fulfill(response=reply, json=content)

    page.goto(f"{address}/rank")
    page.locator("#nothing-text", has_text="No questions wait").wait_for()
    page.route("**/feedback/samples", replace)
    begin_question = f"{question('France')} {SCRIPT}"
    slide(page, 1.5)
    page.fill("#own-question", begin_question)
    page.click("text=Draw answers")
    page.locator(".card").first.wait_for()
    assert page.inner_text("#question") == begin_question
    assert texts(page)[0].startswith(SCRIPT)
    assert page.locator("main img, main b, main script").count() == 0


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_a_lost_connection_loses_nothing_and_doubles_nothing(
    page: "Page", address: str, store: Store, lost: str
) -> None:
    def lose(route: "Route") -> None:
        if lost == "reply":
            route.fetch()  # the server gets it and keeps it; the page never hears so
        route.abort()

    before = len(store.rankings())
    begin(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.route("**/feedback/rankings", lose)
    page.click("#save")
    page.locator("#unsent", has_text="not saved yet").wait_for()
    assert len(store.rankings()) == before + (lost == "reply")
    page.unroute_all(behavior="wait")
    page.reload()  # what this browser keeps is sent by the next page too
    # Playwright's own waiting would evaluate text in the page, which the pages' policy forbids.
    while page.evaluate("localStorage.getItem('bessemer.outbox')") != "[]":
        page.wait_for_timeout(50)
    assert len(store.rankings()) == before + 1
    assert page.locator("#unsent").is_hidden()


def test_chat_streams_stops_and_takes_thumbs(page: "Page", address: str, store: Store) -> None:
    page.goto(address)
    page.fill("#message", question("Japan"))
    page.keyboard.press("Enter")
    page.locator(".reply a").wait_for()
    assert page.inner_text(".reply .text") == answer("Japan")
    assert TAG in page.inner_text(".reply .who")
    rankings = len(store.rankings())
    page.get_by_role("button", name="Good: ").click()
    page.locator("#status", has_text="Saved").wait_for()
    [opinion] = store.opinions()
    assert (opinion.opinion, opinion.response, opinion.model) == ("up", answer("Japan"), TAG)
    page.get_by_role("button", name="Flag ").click()
    page.fill("#flag-note", SCRIPT)
    page.get_by_role("button", name="Flag it").click()
    page.locator("#status", has_text="Flagged").wait_for()
    assert [(one.opinion, one.note) for one in store.opinions()] == [("up", ""), ("flag", SCRIPT)]
    assert len(store.rankings()) == rankings
    with page.context.expect_page() as opened:
        page.click("text=What made this?")
    lineage = opened.value.inner_text("main")
    assert answer("Japan") in lineage
    assert TAG in lineage
    page.route("**/feedback/answers", lambda route: None)  # an answer that does not come
    page.fill("#message", "And then?")
    page.keyboard.press("Enter")
    page.click("#stop")
    page.locator(".reply", has_text="Stopped").wait_for()
    assert page.locator("#send").is_visible()


def test_side_by_side_answers_feed_rankings(page: "Page", address: str, store: Store) -> None:
    page.goto(address)
    page.check("#side-by-side")
    slide(page, 2)
    page.fill("#message", question("France"))
    page.keyboard.press("Enter")
    page.click("text=B is better")
    page.locator(".verdict", has_text="Saved as ranking").wait_for()
    row = store.rankings()[-1]
    shown = page.locator(".reply .text").all_text_contents()
    assert ([text.strip() for text in row.responses], row.ranks) == ([text.strip() for text in shown], [2, 1])
    assert sorted(row.models) == [OTHER, TAG]
    # Whose answer was whose is told only now, and rightly.
    names = page.locator(".reply .who").all_inner_texts()
    assert [model in name for model, name in zip(row.models, names, strict=True)] == [True, True]


def test_pages_fit_a_phone_in_both_colours_and_every_control_has_a_name(browser: "Browser", address: str) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        phone = context.new_page()
        for path in ("/", "/rank", "/provenance", "/api"):
            phone.goto(address + path)
            assert phone.evaluate("document.documentElement.scrollWidth") <= 360, path
            unnamed = "[...document.querySelectorAll('button')].filter(b => !(b.ariaLabel || b.textContent.trim()))"
            assert phone.evaluate(f"{unnamed}.length") == 0, path
        grounds[scheme] = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        phone.click("#theme")
        phone.reload()
        switched = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        assert switched != grounds[scheme]
        context.close()
    assert grounds["light"] != grounds["dark"]
