"""A server with two tiny models and its store, and what tests of the pages do on them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from serving.feedback import VARIABLE, Store
from serving.package import OTHERS
from tests.servers import free_port, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

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
    # The first route takes a moment to hold, in which a post can slip past: have one before any that a test relies on.
    page.route("**/feedback/*", lambda route: route.fallback())
    page.goto(f"{address}/rank")
    if asked is not None:
        page.locator("#nothing", has_text="No questions wait").wait_for()
        ask(page, asked)
    page.locator(".card").first.wait_for()


def ask(page: "Page", asked: str) -> None:
    """Ask for answers to a question of one's own."""
    slide(page, 1.5)
    page.fill("#own-question", asked)
    page.click("text=Draw answers")


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


class Heard(NamedTuple):
    """What a screen reader is told of one element."""

    role: str
    name: str
    description: str
    focusable: bool


def heard(page: "Page") -> list[Heard]:
    """Return the browser's accessibility tree in its order, without what is hidden."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    found = []
    for node in nodes:
        if not node["ignored"]:
            role, name, description = (node.get(part, {}).get("value", "") for part in ("role", "name", "description"))
            focusable = any(one["name"] == "focusable" for one in node.get("properties", []))
            found.append(Heard(role, name, description, focusable))
    return found
