"""The ranking page where something goes wrong: nothing that a person did is lost, and nothing is done twice."""

from typing import TYPE_CHECKING, Any

import pytest

from serving.feedback import Store
from tests.browser_fixtures import browser, page
from tests.page_fixtures import address, ask, begin, folder, order, saved, store, texts
from tests.serving_fixtures import package, question

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page, Route

__all__ = ["address", "browser", "folder", "package", "page", "store"]


def wait_until_sent(page: "Page") -> None:
    """Wait until this browser keeps no judgement that is still to be sent."""
    # Playwright's own waiting would evaluate text in the page, which the pages' policy forbids.
    while page.evaluate("localStorage.getItem('bessemer.outbox')") != "[]":
        page.wait_for_timeout(50)


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
    wait_until_sent(page)
    assert len(store.rankings()) == before + 1
    assert page.locator("#unsent").is_hidden()


@pytest.mark.parametrize(
    "reply",
    [
        {"status": 404, "body": "<h1>Not found</h1>", "content_type": "text/html"},
        {"status": 403, "json": {"detail": "Sign in first."}},
    ],
    ids=["page", "json"],
)
def test_what_another_program_answers_is_no_refusal(
    page: "Page", address: str, store: Store, reply: dict[str, Any]
) -> None:
    before = len(store.rankings())
    begin(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.route("**/feedback/rankings", lambda route: route.fulfill(**reply))
    page.click("#save")
    page.locator("#unsent", has_text=f"The server answered {reply['status']}.").wait_for()
    page.unroute_all(behavior="wait")
    wait_until_sent(page)
    assert len(store.rankings()) == before + 1


def test_a_refusal_of_the_endpoint_is_told_and_not_sent_again(page: "Page", address: str) -> None:
    begin(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.route("**/feedback/rankings", lambda route: route.fulfill(status=404, json={"error": "No such answer."}))
    page.click("#save")
    page.locator("#status", has_text="refused and is not saved: No such answer.").wait_for()
    wait_until_sent(page)


def test_a_refused_question_of_ones_own_leaves_the_ranking_under_way(page: "Page", address: str, store: Store) -> None:
    begin(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    shown = texts(page)
    page.click("summary")
    page.fill("#own-question", "Why? " * 200)
    page.click("#draw")
    page.locator("#status", has_text="too long").wait_for()
    assert texts(page) == shown
    assert page.inner_text("#question") == question("Italy")
    page.click("#save")
    assert order(saved(page, store)) == [{text} for text in shown]


def test_a_reload_brings_the_ranking_under_way_back(page: "Page", address: str, store: Store) -> None:
    begin(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("=")
    shown = texts(page)
    page.get_by_role("button", name="Flag answer B").click()
    page.get_by_role("button", name="Flag it").click()
    page.locator("#status", has_text="Flagged").wait_for()
    page.reload()
    page.locator(".place.tied").wait_for()
    assert texts(page) == shown
    assert page.inner_text("#question") == question("Italy")
    assert page.locator("#own[open]").count() == 0
    assert page.get_by_role("button", name="Flag answer B").get_attribute("aria-pressed") == "true"
    page.click("#save")
    assert order(saved(page, store)) == [set(shown[:2]), {shown[2]}, {shown[3]}]
    page.reload()  # what is saved is not brought back
    page.locator("#nothing", has_text="No questions wait").wait_for()


def test_answers_that_come_leave_the_keyboard_to_who_types_another_question(page: "Page", address: str) -> None:
    begin(page, address, question("Italy"))
    assert page.evaluate("document.activeElement.className") == "card"
    page.click("#own summary")
    release = hold(page, "samples")
    ask(page, question("Japan"))
    page.fill("#own-question", "And what is")
    release()
    page.locator("#question", has_text=question("Japan")).wait_for()
    page.keyboard.type(" the capital of Peru?")
    assert page.input_value("#own-question") == "And what is the capital of Peru?"


def test_a_skipped_ranking_is_not_brought_back(page: "Page", address: str) -> None:
    begin(page, address, question("Italy"))
    page.click("#skip")
    page.locator("#nothing", has_text="No questions wait").wait_for()
    page.reload()
    page.locator("#nothing", has_text="No questions wait").wait_for()


def hold(page: "Page", route: str) -> "Callable[[], None]":
    """Keep posts to a route on their way until the function that is returned is called."""
    held: list[Route] = []
    page.route(f"**/feedback/{route}", lambda one: held.append(one))

    def release() -> None:
        while not held:
            page.wait_for_timeout(20)
        held.pop().continue_()

    return release


def save_one_and_draw_another(page: "Page", address: str, store: Store) -> Any:
    """Return the row of a saved ranking; another one is under way, moved and not saved."""
    begin(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.click("#save")
    row = saved(page, store)
    page.locator("#nothing", has_text="No questions wait").wait_for()
    ask(page, question("Japan"))
    page.locator(".card").first.wait_for()
    page.keyboard.press("Shift+ArrowDown")
    return row


def test_nothing_is_undone_or_skipped_while_a_ranking_is_on_its_way(page: "Page", address: str, store: Store) -> None:
    first = save_one_and_draw_another(page, address, store)
    shown = texts(page)
    release = hold(page, "rankings")
    page.keyboard.press("Control+Enter")
    assert [page.locator(f"#{name}").is_disabled() for name in ("save", "skip", "undo", "draw")] == [True] * 4
    release()
    page.locator("#nothing", has_text="No questions wait").wait_for()
    second = store.rankings()[-1]
    assert order(second) == [{text} for text in shown]
    assert store.rankings()[-2].id == first.id
    page.click("#undo")  # takes back the one that was on its way, not the one before
    page.locator("#status", has_text="Taken back").wait_for()
    assert store.rankings()[-1].id == first.id
    assert texts(page) == shown


def test_nothing_is_saved_while_a_ranking_is_being_taken_back(page: "Page", address: str, store: Store) -> None:
    first = save_one_and_draw_another(page, address, store)
    before = len(store.rankings())
    shown = texts(page)
    release = hold(page, "withdrawals")
    page.click("#undo")
    page.keyboard.press("Control+Enter")
    assert [page.locator(f"#{name}").is_disabled() for name in ("save", "skip", "undo", "draw")] == [True] * 4
    release()
    page.locator("#status", has_text="Taken back").wait_for()
    assert page.inner_text("#question") == question("Italy")
    page.click("#save")
    page.locator("#question", has_text=question("Japan")).wait_for()
    again = store.rankings()[-1]
    assert (again.responses, again.ranks) == (first.responses, first.ranks)
    assert texts(page) == shown  # the one that was under way, as it was
    page.click("#save")
    page.locator("#nothing", has_text="No questions wait").wait_for()
    assert order(store.rankings()[-1]) == [{text} for text in shown]
    assert len(store.rankings()) == before + 1
