"""The chat page in a real browser: answers, opinions on them, and which of two is better."""

import json
from typing import TYPE_CHECKING, Any

from serving.feedback import Store
from tests.browser_fixtures import browser, page
from tests.page_fixtures import OTHER, SCRIPT, address, folder, slide, store
from tests.serving_fixtures import TAG, answer, package, question

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page, Route

__all__ = ["address", "browser", "folder", "package", "page", "store"]


def test_chat_streams_stops_and_takes_thumbs(page: "Page", address: str, store: Store) -> None:
    page.goto(address)
    page.fill("#message", question("Japan"))
    page.keyboard.press("Enter")
    page.locator(".reply a").wait_for()
    assert page.inner_text(".reply .text") == answer("Japan")
    assert TAG in page.inner_text(".reply .who")
    rankings = len(store.rankings())
    page.get_by_role("button", name="Good: ").click()
    page.locator("#status", has_text="Saved").wait_for()
    [opinion] = store.opinions()
    assert (opinion.opinion, opinion.response, opinion.model) == ("up", answer("Japan"), TAG)
    page.get_by_role("button", name="Flag ").click()
    page.fill("#flag-note", SCRIPT)
    page.get_by_role("button", name="Flag it").click()
    page.locator("#status", has_text="Flagged").wait_for()
    assert [(one.opinion, one.note) for one in store.opinions()] == [("up", ""), ("flag", SCRIPT)]
    assert len(store.rankings()) == rankings
    with page.context.expect_page() as opened:
        page.click("text=What made this?")
    lineage = opened.value.inner_text("main")
    assert answer("Japan") in lineage
    assert TAG in lineage
    page.route("**/feedback/answers", lambda route: None)  # an answer that does not come
    page.fill("#message", "And then?")
    page.keyboard.press("Enter")
    page.click("#stop")
    page.locator(".reply", has_text="Stopped").wait_for()
    assert page.locator("#send").is_visible()


def test_side_by_side_answers_feed_rankings(page: "Page", address: str, store: Store) -> None:
    page.goto(address)
    page.check("#side-by-side")
    slide(page, 2)
    page.fill("#message", question("France"))
    page.keyboard.press("Enter")
    page.click("text=B is better")
    page.locator(".verdict", has_text="Saved as ranking").wait_for()
    row = store.rankings()[-1]
    shown = page.locator(".reply .text").all_text_contents()
    assert ([text.strip() for text in row.responses], row.ranks) == ([text.strip() for text in shown], [2, 1])
    assert sorted(row.models) == [OTHER, TAG]
    # Whose answer was whose is told only now, and rightly.
    names = page.locator(".reply .who").all_inner_texts()
    assert [model in name for model, name in zip(row.models, names, strict=True)] == [True, True]


def stand_in(page: "Page", store: Store, say: "Callable[[dict[str, Any]], str]") -> None:
    """Answer in the models' place as the endpoint would, in words of the test's."""

    def reply(route: "Route") -> None:
        request = json.loads(route.request.post_data or "")
        text, name = say(request), request["model"]
        [kept] = store.add_answers(request["messages"], [(text, f"{name}-tag", 0.0, None)])
        end = {"id": kept, "name": name, "model": f"{name}-tag", "finish_reason": "stop", "problem": None}
        events = [{"text": text}, end]
        route.fulfill(
            content_type="text/event-stream", body="".join(f"data: {json.dumps(event)}\n\n" for event in events)
        )

    page.route("**/feedback/answers", reply)


def test_every_model_answers_side_by_side_and_what_says_the_same_is_judged_once(
    page: "Page", address: str, store: Store
) -> None:
    said = {"bessemer": "Lima.", "other": " Lima. ", "third": "Quito.", "fourth": "Cusco."}  # the server has but two
    stand_in(page, store, lambda asked: said[asked["model"]])
    page.goto(address)
    page.check("#side-by-side")
    page.evaluate(
        "for (const name of ['third', 'fourth', '']) document.getElementById('second').add(new Option(name, name))"
    )
    page.select_option("#second", "")
    page.fill("#message", "What is the capital of Peru?")
    page.keyboard.press("Enter")
    page.locator(".verdict").wait_for()
    shown = [text.strip() for text in page.locator(".reply .text").all_inner_texts()]
    assert sorted(shown) == ["Cusco.", "Lima.", "Lima.", "Quito."]
    same = " and ".join("ABCD"[place] for place, text in enumerate(shown) if text == "Lima.")
    buttons = page.locator(".verdict button").all_inner_texts()
    assert buttons[-1] == "All alike"
    page.click(f"text={same} are best")
    page.locator(".verdict", has_text="Saved as ranking").wait_for()
    row = store.rankings()[-1]
    assert [(text.strip(), rank) for text, rank in zip(row.responses, row.ranks, strict=True)] == [
        (text, 1 if text == "Lima." else 2) for text in dict.fromkeys(shown)
    ]
    assert page.locator(".reply.chosen").count() == 2
    assert page.locator(".reply a").count() == 4


def test_a_late_verdict_changes_its_own_turn_alone(page: "Page", address: str, store: Store) -> None:
    asked: list[list[dict[str, str]]] = []

    def say(request: dict[str, Any]) -> str:
        """Answer in words that tell which answer to which question it is."""
        asked.append(request["messages"])
        return f"Reply {len(asked)} to {request['messages'][-1]['content']}"

    stand_in(page, store, say)
    page.goto(address)
    page.check("#side-by-side")
    page.check("#remembers")
    for count, words in enumerate(("one?", "two?"), 1):
        page.fill("#message", words)
        page.keyboard.press("Enter")
        page.locator(".verdict").nth(count - 1).wait_for()
    shown = page.locator(".reply .text").all_inner_texts()
    page.locator(".verdict").first.get_by_role("button", name="B is better").click()
    page.locator(".verdict", has_text="Saved as ranking").wait_for()
    page.fill("#message", "three?")
    page.keyboard.press("Enter")
    page.locator(".verdict").nth(2).wait_for()
    assert [turn["content"] for turn in asked[-1]] == ["one?", shown[1], "two?", shown[2], "three?"]
