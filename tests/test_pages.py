"""All pages: phone width, two colour schemes, and an accessible name for every control."""

from typing import TYPE_CHECKING

from tests.browser_fixtures import browser, page
from tests.page_fixtures import accessibility_tree, address, folder, open_ranking
from tests.serving_fixtures import package, question

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["address", "browser", "folder", "package", "page"]


def test_pages_fit_a_phone_in_both_colours(browser: "Browser", address: str) -> None:
    backgrounds = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        phone = context.new_page()
        for path in ("/", "/rank", "/provenance", "/api"):
            phone.goto(address + path)
            assert phone.evaluate("document.documentElement.scrollWidth") <= 360, path
        backgrounds[scheme] = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        phone.click("#theme")
        phone.reload()
        switched = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        assert switched != backgrounds[scheme]
        context.close()
    assert backgrounds["light"] != backgrounds["dark"]


def test_every_control_has_a_name(page: "Page", address: str) -> None:
    """The accessibility tree of each page with everything open, including the ranking cards."""
    page.goto(address)
    page.check("#side-by-side")
    page.fill("#message", question("France"))
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Flag Answer B").wait_for()
    roles = focusable_roles(page) | open_flag_dialog(page, "Flag Answer B")
    assert roles >= {"link", "checkbox", "combobox", "slider", "textbox", "button", "dialog"}
    open_ranking(page, address, question("France"))
    page.click("summary")
    roles = focusable_roles(page) | open_flag_dialog(page, "Flag answer A")
    assert roles >= {"link", "checkbox", "combobox", "slider", "textbox", "button", "group", "dialog"}
    for path in ("/provenance", "/api"):
        page.goto(address + path)
        assert focusable_roles(page) >= {"link", "button"}


def open_flag_dialog(page: "Page", button: str) -> set[str]:
    page.get_by_role("button", name=button, exact=True).click()
    return focusable_roles(page)


def focusable_roles(page: "Page") -> set[str]:
    """Return the roles of all focusable elements; assert that each has a name."""
    controls = [
        node for node in accessibility_tree(page) if node.focusable and node.role != "main"
    ]  # `main` is the target of the skip link
    assert [node for node in controls if not node.name.strip()] == []
    return {node.role for node in controls}
