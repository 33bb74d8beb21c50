"""Failures on the ranking page: no ranking is lost, and none is stored twice."""

from typing import TYPE_CHECKING, Any

import pytest

from serving.feedback.store import Store
from tests.browser_fixtures import browser, page
from tests.page_fixtures import (
    address,
    answer_texts,
    ask_question,
    folder,
    open_ranking,
    ranked_texts,
    store,
    wait_for_saved,
)
from tests.serving_fixtures import package, question

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page, Route

__all__ = ["address", "browser", "folder", "package", "page", "store"]


def wait_until_sent(page: "Page") -> None:
    """Wait until the outbox is empty."""
    # Playwright's wait_for_function evaluates text in the page, which the CSP forbids.
    while page.evaluate("localStorage.getItem('bessemer.outbox')") != "[]":
        page.wait_for_timeout(50)


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_lost_connection_stores_the_ranking_once(page: "Page", address: str, store: Store, lost: str) -> None:
    def lose(route: "Route") -> None:
        if lost == "reply":
            route.fetch()  # the server stores it, but the page gets no reply
        route.abort()

    before = len(store.rankings())
    open_ranking(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.route("**/feedback/rankings", lose)
    page.click("#save")
    page.locator("#unsent", has_text="not saved yet").wait_for()
    assert len(store.rankings()) == before + (lost == "reply")
    page.unroute_all(behavior="wait")
    page.reload()  # the next page sends the outbox too
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
def test_error_from_another_program_is_retried(page: "Page", address: str, store: Store, reply: dict[str, Any]) -> None:
    before = len(store.rankings())
    open_ranking(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.route("**/feedback/rankings", lambda route: route.fulfill(**reply))
    page.click("#save")
    page.locator("#unsent", has_text=f"The server answered {reply['status']}.").wait_for()
    page.unroute_all(behavior="wait")
    wait_until_sent(page)
    assert len(store.rankings()) == before + 1


def test_rejected_ranking_is_reported_and_not_retried(page: "Page", address: str) -> None:
    open_ranking(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.route("**/feedback/rankings", lambda route: route.fulfill(status=404, json={"error": "No such answer."}))
    page.click("#save")
    page.locator("#status", has_text="rejected and is not saved: No such answer.").wait_for()
    wait_until_sent(page)


def test_rejected_own_question_keeps_the_current_ranking(page: "Page", address: str, store: Store) -> None:
    open_ranking(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    answers = answer_texts(page)
    page.click("summary")
    page.fill("#own-question", "Why? " * 200)
    page.click("#draw")
    page.locator("#status", has_text="too long").wait_for()
    assert answer_texts(page) == answers
    assert page.inner_text("#question") == question("Italy")
    page.click("#save")
    assert ranked_texts(wait_for_saved(page, store)) == [{text} for text in answers]


def test_reload_restores_the_current_ranking(page: "Page", address: str, store: Store) -> None:
    open_ranking(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("=")
    answers = answer_texts(page)
    page.get_by_role("button", name="Flag answer B").click()
    page.get_by_role("button", name="Flag it").click()
    page.locator("#status", has_text="Flagged").wait_for()
    page.reload()
    page.locator(".place.tied").wait_for()
    assert answer_texts(page) == answers
    assert page.inner_text("#question") == question("Italy")
    assert page.locator("#own[open]").count() == 0
    assert page.get_by_role("button", name="Flag answer B").get_attribute("aria-pressed") == "true"
    page.click("#save")
    assert ranked_texts(wait_for_saved(page, store)) == [set(answers[:2]), {answers[2]}, {answers[3]}]
    page.reload()  # a saved ranking is not restored
    page.locator("#nothing", has_text="No questions are waiting").wait_for()


def test_new_answers_do_not_take_focus_from_typing(page: "Page", address: str) -> None:
    open_ranking(page, address, question("Italy"))
    assert page.evaluate("document.activeElement.className") == "card"
    page.click("#own summary")
    release = hold_posts(page, "samples")
    ask_question(page, question("Japan"))
    page.fill("#own-question", "And what is")
    release()
    page.locator("#question", has_text=question("Japan")).wait_for()
    page.keyboard.type(" the capital of Peru?")
    assert page.input_value("#own-question") == "And what is the capital of Peru?"


def test_reload_does_not_restore_a_skipped_question(page: "Page", address: str) -> None:
    open_ranking(page, address, question("Italy"))
    page.click("#skip")
    page.locator("#nothing", has_text="No questions are waiting").wait_for()
    page.reload()
    page.locator("#nothing", has_text="No questions are waiting").wait_for()


def hold_posts(page: "Page", route: str) -> "Callable[[], None]":
    """Hold posts to a route until the returned function is called."""
    pending: list[Route] = []
    page.route(f"**/feedback/{route}", lambda one: pending.append(one))

    def release() -> None:
        while not pending:
            page.wait_for_timeout(20)
        pending.pop().continue_()

    return release


def save_one_and_draw_another(page: "Page", address: str, store: Store) -> Any:
    """Save one ranking and return its row; start another one, moved and not saved."""
    open_ranking(page, address, question("Italy"))
    page.keyboard.press("Shift+ArrowDown")
    page.click("#save")
    row = wait_for_saved(page, store)
    page.locator("#nothing", has_text="No questions are waiting").wait_for()
    ask_question(page, question("Japan"))
    page.locator(".card").first.wait_for()
    page.keyboard.press("Shift+ArrowDown")
    return row


def test_undo_and_skip_are_disabled_while_a_ranking_is_sent(page: "Page", address: str, store: Store) -> None:
    first = save_one_and_draw_another(page, address, store)
    answers = answer_texts(page)
    release = hold_posts(page, "rankings")
    page.keyboard.press("Control+Enter")
    assert [page.locator(f"#{name}").is_disabled() for name in ("save", "skip", "undo", "draw")] == [True] * 4
    release()
    page.locator("#nothing", has_text="No questions are waiting").wait_for()
    second = store.rankings()[-1]
    assert ranked_texts(second) == [{text} for text in answers]
    assert store.rankings()[-2].id == first.id
    page.click("#undo")  # withdraws the one that was pending, not the one before
    page.locator("#status", has_text="Taken back").wait_for()
    assert store.rankings()[-1].id == first.id
    assert answer_texts(page) == answers


def test_save_is_disabled_while_a_ranking_is_withdrawn(page: "Page", address: str, store: Store) -> None:
    first = save_one_and_draw_another(page, address, store)
    before = len(store.rankings())
    answers = answer_texts(page)
    release = hold_posts(page, "withdrawals")
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
    assert answer_texts(page) == answers  # the postponed one, unchanged
    page.click("#save")
    page.locator("#nothing", has_text="No questions are waiting").wait_for()
    assert ranked_texts(store.rankings()[-1]) == [{text} for text in answers]
    assert len(store.rankings()) == before + 1
