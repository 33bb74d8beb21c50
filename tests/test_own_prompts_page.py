"""Prompts of the project's own data on the ranking page, where nobody has written questions."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serving.feedback.store import FEEDBACK_VARIABLE
from tests.browser_fixtures import browser, page
from tests.page_fixtures import set_temperature
from tests.servers import free_port, serving
from tests.serving_fixtures import package, question

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

__all__ = ["browser", "package", "page"]

TURNS = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": question("Italy")},
]  # fmt: skip
FRANCE = [{"role": "user", "content": question("France")}]
LONG = "All of it, please. " * 60


@pytest.fixture(scope="module")
def own_address(package: Path, browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose package has prompts, one of them twice, one too long; there is no questions.txt."""
    folder = tmp_path_factory.mktemp("own") / "package"
    shutil.copytree(package, folder)
    prompts = [TURNS, FRANCE, FRANCE, [{"role": "user", "content": LONG}]]
    content = {"prompts": prompts, "samples": [question("France")], "masked": None, "classified": None}
    (folder / "examples.json").write_text(json.dumps(content), encoding="utf-8")
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FEEDBACK_VARIABLE, str(folder.parent / "feedback"))
        with serving("serving.serve", str(port), package=folder, port=port, log=log):
            yield f"http://127.0.0.1:{port}"


def open_with(page: "Page", address: str, prompt: list[dict[str, str]]) -> None:
    """Open the ranking page with a prompt and answers that no model gave."""
    answers = [{"id": name, "text": name * 40} for name in ("one", "two")]
    reply = {"prompt": prompt, "answers": answers, "questions": 1, "waiting": 1}

    def answer(route: "Route") -> None:
        route.fulfill(json=reply)

    page.route("**/feedback/samples", answer)
    page.goto(f"{address}/rank")
    page.locator(".card").first.wait_for()


def test_ranking_page_offers_the_projects_prompts(page: "Page", own_address: str) -> None:
    page.add_init_script("localStorage.setItem('bessemer.ranking', JSON.stringify({temperature: '1.5'}))")
    page.goto(f"{own_address}/rank")
    shown = set()
    for _ in range(2):
        page.locator(".card").first.wait_for()
        shown.add(page.inner_text("#question"))
        assert page.locator("#whole").is_hidden()
        page.click("#skip")
        page.locator("#task").wait_for(state="hidden")
    page.locator("#nothing", has_text="You have ranked or skipped all questions").wait_for()
    assert shown == {question("France"), f"User: Hi\n\nAssistant: Hello.\n\nUser: {question('Italy')}"}
    assert page.inner_text("#queue").endswith("2 of 2")
    assert page.get_attribute("#own-question", "placeholder") == f"Ask a question, such as: {question('France')}"


def test_long_prompt_is_shortened_until_asked_for(page: "Page", own_address: str) -> None:
    open_with(page, own_address, [{"role": "user", "content": LONG}])
    assert len(page.inner_text("#question")) < 610 < len(LONG)
    page.click("text=Show the whole question")
    assert page.inner_text("#question").strip() == LONG.strip()
    assert page.locator("#whole").is_hidden()


def test_end_of_a_long_conversation_is_shown(page: "Page", own_address: str) -> None:
    turns = [{"role": role, "content": LONG} for role in ("user", "assistant")]
    open_with(page, own_address, [*turns, {"role": "user", "content": "And in one word?"}])
    assert page.inner_text("#question").endswith("User: And in one word?")
    assert page.locator("#whole").is_visible()


def test_words_without_spaces_fit_a_phone(page: "Page", own_address: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    open_with(page, own_address, [{"role": "user", "content": "x" * 300}])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_api_page_without_a_masked_text_is_neutral(page: "Page", own_address: str) -> None:
    page.goto(f"{own_address}/api")
    assert "A [MASK] is missing here." in page.inner_text("main")
    page.goto(own_address)
    set_temperature(page, 0.5)
    assert page.get_attribute("#message", "placeholder") == f"Ask a question, such as: {question('France')}"
