"""A server with two tiny models, its store, and helpers for tests of the pages."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from serving.feedback.store import FEEDBACK_VARIABLE, Store
from serving.package import MODELS_VARIABLE
from tests.servers import free_port, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OTHER_TAG = "other-aaaaaaaaaaaa-bbbbbbbbbbbb"
SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)</script> <b>bold</b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback")


@pytest.fixture(scope="module")
def address(package: Path, folder: Path, browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with two models and no questions yet."""
    other = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(package / "chat", other / "chat")
    (other / "provenance.json").write_text(json.dumps({"model": OTHER_TAG, "stages": [{"stage": "finetune"}]}))
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FEEDBACK_VARIABLE, str(folder))
        patch.setenv(MODELS_VARIABLE, json.dumps({"other": str(other)}))
        with serving("serving.serve", str(port), package=package, port=port, log=log):
            yield f"http://127.0.0.1:{port}"


@pytest.fixture
def store(folder: Path, address: str) -> Iterator[Store]:
    """The server's store, opened by the test process."""
    feedback_store = Store(folder)
    yield feedback_store
    feedback_store.close()


def open_ranking(page: "Page", address: str, question: str | None = None) -> None:
    """Open the ranking page and wait for answers to the user's question, by default to the next waiting one."""
    # The first route takes effect with a delay, in which a post could pass: install one before those of the test.
    page.route("**/feedback/*", lambda route: route.fallback())
    page.goto(f"{address}/rank")
    if question is not None:
        page.locator("#nothing", has_text="No questions are waiting").wait_for()
        ask_question(page, question)
    page.locator(".card").first.wait_for()


def ask_question(page: "Page", question: str) -> None:
    """Request answers to the user's own question."""
    set_temperature(page, 1.5)
    page.fill("#own-question", question)
    page.click("text=Generate answers")


def set_temperature(page: "Page", temperature: float) -> None:
    page.locator("#temperature").fill(str(temperature))


def answer_texts(page: "Page") -> list[str]:
    return page.locator(".card .text").all_inner_texts()


def wait_for_saved(page: "Page", store: Store) -> Any:
    """Wait until the page says that a ranking is saved, and return the newest row."""
    page.locator("#status", has_text="Saved as ranking").wait_for()
    row = store.rankings()[-1]
    assert f"Saved as ranking {row.number}." in page.inner_text("#status")
    return row


def ranked_texts(row: Any) -> list[set[str]]:
    """Return the responses of a row by rank."""
    pairs = list(zip(row.ranks, row.responses, strict=True))
    return [{text for rank, text in pairs if rank == place} for place in range(1, max(row.ranks) + 1)]


class AccessibleNode(NamedTuple):
    """One element of the accessibility tree."""

    role: str
    name: str
    description: str
    focusable: bool


def accessibility_tree(page: "Page") -> list[AccessibleNode]:
    """Return the browser's accessibility tree in order, without ignored nodes."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    elements = []
    for node in nodes:
        if not node["ignored"]:
            role, name, description = (node.get(part, {}).get("value", "") for part in ("role", "name", "description"))
            focusable = any(one["name"] == "focusable" for one in node.get("properties", []))
            elements.append(AccessibleNode(role, name, description, focusable))
    return elements
