"""The ranking page where something goes wrong: nothing that a person did is lost, and nothing is done twice."""

from typing import TYPE_CHECKING, Any

import pytest

from serving.feedback import Store
from tests.browser_fixtures import browser, page
from tests.page_fixtures import address, begin, folder, store
from tests.serving_fixtures import package, question

if TYPE_CHECKING:
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
