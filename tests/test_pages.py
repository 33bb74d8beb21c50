"""What all pages promise: they fit a phone, come in two colour schemes, and name every control."""

from typing import TYPE_CHECKING

from tests.browser_fixtures import browser, page
from tests.page_fixtures import address, begin, folder, heard
from tests.serving_fixtures import package, question

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["address", "browser", "folder", "package", "page"]


def test_pages_fit_a_phone_in_both_colours(browser: "Browser", address: str) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        phone = context.new_page()
        for path in ("/", "/rank", "/provenance", "/api"):
            phone.goto(address + path)
            assert phone.evaluate("document.documentElement.scrollWidth") <= 360, path
        grounds[scheme] = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        phone.click("#theme")
        phone.reload()
        switched = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        assert switched != grounds[scheme]
        context.close()
    assert grounds["light"] != grounds["dark"]


def test_every_control_has_a_name(page: "Page", address: str) -> None:
    """What a screen reader finds on each page with everything on it open, the ranking's cards included."""
    page.goto(address)
    page.check("#side-by-side")
    page.fill("#message", question("France"))
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Flag Answer B").wait_for()
    found = named(page) | opened_flag(page, "Flag Answer B")
    assert found >= {"link", "checkbox", "combobox", "slider", "textbox", "button", "dialog"}
    begin(page, address, question("France"))
    page.click("summary")
    found = named(page) | opened_flag(page, "Flag answer A")
    assert found >= {"link", "checkbox", "combobox", "slider", "textbox", "button", "group", "dialog"}
    for path in ("/provenance", "/api"):
        page.goto(address + path)
        assert named(page) >= {"link", "button"}


def opened_flag(page: "Page", button: str) -> set[str]:
    page.get_by_role("button", name=button, exact=True).click()
    return named(page)


def named(page: "Page") -> set[str]:
    """Return the roles of all that can have the focus, having looked that each has a name."""
    controls = [node for node in heard(page) if node.focusable and node.role != "main"]  # where the skip link leads to
    assert [node for node in controls if not node.name.strip()] == []
    return {node.role for node in controls}
