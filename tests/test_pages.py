"""What all pages promise: they fit a phone, come in two colour schemes, and name every button."""

from typing import TYPE_CHECKING

from tests.browser_fixtures import browser
from tests.page_fixtures import address, folder
from tests.serving_fixtures import package

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["address", "browser", "folder", "package"]


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
