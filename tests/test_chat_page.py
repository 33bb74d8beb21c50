"""The chat page in a real browser: streaming, opinions, and side-by-side comparisons."""

import json
from typing import TYPE_CHECKING, Any

from serving.feedback.store import Store
from tests.browser_fixtures import browser, page
from tests.page_fixtures import OTHER_TAG, SCRIPT, address, folder, set_temperature, store
from tests.serving_fixtures import TAG, answer, package, question

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page, Route

__all__ = ["address", "browser", "folder", "package", "page", "store"]


def test_chat_streams_stops_and_stores_thumbs(page: "Page", address: str, store: Store) -> None:
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
    with page.context.expect_page() as popup:
        page.click("text=What made this?")
    lineage = popup.value.inner_text("main")
    assert answer("Japan") in lineage
    assert TAG in lineage
    page.route("**/feedback/answers", lambda route: None)  # an answer that never arrives
    page.fill("#message", "And then?")
    page.keyboard.press("Enter")
    page.click("#stop")
    page.locator(".reply", has_text="Stopped").wait_for()
    assert page.locator("#send").is_visible()


def test_side_by_side_answers_feed_rankings(page: "Page", address: str, store: Store) -> None:
    page.goto(address)
    page.check("#side-by-side")
    set_temperature(page, 2)
    # Both models have the same weights, so a memorized answer could be equal from both.
    page.fill("#message", "Tell me of the old harbour, the lamps and the river at night.")
    page.keyboard.press("Enter")
    page.click("text=B is better")
    page.locator(".verdict", has_text="Saved as ranking").wait_for()
    row = store.rankings()[-1]
    answers = page.locator(".reply .text").all_text_contents()
    assert ([text.strip() for text in row.responses], row.ranks) == ([text.strip() for text in answers], [2, 1])
    assert sorted(row.models) == [OTHER_TAG, TAG]
    # The models are revealed only now, and correctly.
    names = page.locator(".reply .who").all_inner_texts()
    assert [model in name for model, name in zip(row.models, names, strict=True)] == [True, True]


def fake_answers(page: "Page", store: Store, say: "Callable[[dict[str, Any]], str]") -> None:
    """Reply like the endpoint, with texts from `say` instead of the models'."""

    def reply(route: "Route") -> None:
        request = json.loads(route.request.post_data or "")
        text, name = say(request), request["model"]
        [answer_id] = store.add_answers(request["messages"], [(text, f"{name}-tag", 0.0, None)])
        end = {"id": answer_id, "name": name, "model": f"{name}-tag", "finish_reason": "stop", "problem": None}
        events = [{"text": text}, end]
        route.fulfill(
            content_type="text/event-stream", body="".join(f"data: {json.dumps(event)}\n\n" for event in events)
        )

    page.route("**/feedback/answers", reply)


def test_side_by_side_groups_equal_answers(page: "Page", address: str, store: Store) -> None:
    reply_by_model = {
        "bessemer": "Lima.",
        "other": " Lima. ",
        "third": "Quito.",
        "fourth": "Cusco.",
    }  # the server has only two models
    fake_answers(page, store, lambda request: reply_by_model[request["model"]])
    page.goto(address)
    page.check("#side-by-side")
    page.evaluate(
        "for (const name of ['third', 'fourth', '']) document.getElementById('second').add(new Option(name, name))"
    )
    page.select_option("#second", "")
    page.fill("#message", "What is the capital of Peru?")
    page.keyboard.press("Enter")
    page.locator(".verdict").wait_for()
    answers = [text.strip() for text in page.locator(".reply .text").all_inner_texts()]
    assert sorted(answers) == ["Cusco.", "Lima.", "Lima.", "Quito."]
    same = " and ".join("ABCD"[place] for place, text in enumerate(answers) if text == "Lima.")
    buttons = page.locator(".verdict button").all_inner_texts()
    assert buttons[-1] == "All alike"
    page.click(f"text={same} are best")
    page.locator(".verdict", has_text="Saved as ranking").wait_for()
    row = store.rankings()[-1]
    assert [(text.strip(), rank) for text, rank in zip(row.responses, row.ranks, strict=True)] == [
        (text, 1 if text == "Lima." else 2) for text in dict.fromkeys(answers)
    ]
    assert page.locator(".reply.chosen").count() == 2
    assert page.locator(".reply a").count() == 4


def test_late_verdict_changes_only_its_own_turn(page: "Page", address: str, store: Store) -> None:
    conversations: list[list[dict[str, str]]] = []

    def say(request: dict[str, Any]) -> str:
        """Return a text with the number of the reply and its question."""
        conversations.append(request["messages"])
        return f"Reply {len(conversations)} to {request['messages'][-1]['content']}"

    fake_answers(page, store, say)
    page.goto(address)
    page.check("#side-by-side")
    page.check("#remembers")
    for count, words in enumerate(("one?", "two?"), 1):
        page.fill("#message", words)
        page.keyboard.press("Enter")
        page.locator(".verdict").nth(count - 1).wait_for()
    answers = page.locator(".reply .text").all_inner_texts()
    page.locator(".verdict").first.get_by_role("button", name="B is better").click()
    page.locator(".verdict", has_text="Saved as ranking").wait_for()
    page.fill("#message", "three?")
    page.keyboard.press("Enter")
    page.locator(".verdict").nth(2).wait_for()
    assert [turn["content"] for turn in conversations[-1]] == ["one?", answers[1], "two?", answers[2], "three?"]
