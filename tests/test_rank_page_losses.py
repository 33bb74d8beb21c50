"""The ranking page where something goes wrong: nothing that a person did is lost, and nothing is done twice."""

from typing import TYPE_CHECKING

import pytest

from serving.feedback import Store
from tests.browser_fixtures import browser, page
from tests.page_fixtures import address, begin, folder, store
from tests.serving_fixtures import package, question

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

__all__ = ["address", "browser", "folder", "package", "page", "store"]


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
