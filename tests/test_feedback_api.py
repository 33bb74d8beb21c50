"""The routes behind the pages, in process, with a real model: what they draw, keep and refuse."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serving import feedback_api, pages
from serving.feedback import Store
from serving.package import Model, open_models, open_package
from serving.questions import Questions
from tests.serving_fixtures import TAG, answer, package, question

__all__ = ["package"]

WHO = "annotator-one"
OTHER = "other-aaaaaaaaaaaa-bbbbbbbbbbbb"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "feedback")
    yield opened
    opened.close()


@pytest.fixture
def client(package: Path, store: Store) -> TestClient:
    """A client of the pages' routes, with the package and the same weights again as another model."""
    app = Starlette(routes=[*pages.ROUTES, *feedback_api.ROUTES])
    opened = open_package(package)
    models = open_models(opened)
    other = Model("other", opened.folder, OTHER, {"model": OTHER}, opened.created)
    app.state.package, app.state.models = opened, {**models, "other": other}
    app.state.store, app.state.questions, app.state.store_problem = store, Questions(store), None
    return TestClient(app)


def samples(client: TestClient, **changes: Any) -> Any:
    asked = {"annotator": WHO, "question": question("France"), "count": 3, "temperature": 1.5, **changes}
    return client.post("/feedback/samples", json=asked).raise_for_status().json()


def post_ranking(client: TestClient, answers: list[str], **changes: Any) -> Any:
    asked = {"id": "ranking-1", "answers": answers, "ranks": list(range(1, len(answers) + 1)), "annotator": WHO}
    return client.post("/feedback/rankings", json={**asked, **changes})


def test_answers_are_drawn_in_blind_order_and_ranked(client: TestClient, store: Store) -> None:
    drawn = samples(client, count=6, temperature=2.0)
    assert drawn["prompt"] == [{"role": "user", "content": question("France")}]
    texts = [answer["text"] for answer in drawn["answers"]]
    assert len(set(texts)) == len(texts) == 6
    assert TAG not in json.dumps(drawn)
    assert OTHER not in json.dumps(drawn)
    ids = [answer["id"] for answer in drawn["answers"]]
    saved = post_ranking(client, ids, ranks=[2, 1, 1, 3, 4, 5]).json()["saved"]
    assert post_ranking(client, ids, ranks=[2, 1, 1, 3, 4, 5]).json()["saved"] == saved
    [kept] = store.rankings()
    assert (kept.responses, kept.ranks) == (texts, [2, 1, 1, 3, 4, 5])
    assert set(kept.models) == {OTHER, TAG}  # in turn, but for a draw that says what another said


def test_one_model_alone_and_what_it_cannot(client: TestClient) -> None:
    ids = [answer["id"] for answer in samples(client, models=["other"])["answers"]]
    assert set(post_ranking(client, ids).json()["saved"]["models"]) == {OTHER}
    same = client.post("/feedback/samples", json={"annotator": WHO, "question": question("France"), "temperature": 0.0})
    assert (same.status_code, "one and the same answer each time" in same.json()["error"]) == (409, True)
    unknown = client.post("/feedback/samples", json={"annotator": WHO, "question": "Hi", "models": ["gpt-9"]})
    assert (unknown.status_code, '"gpt-9" does not exist here' in unknown.json()["error"]) == (404, True)


def test_questions_wait_until_they_are_ranked_or_skipped(client: TestClient, store: Store) -> None:
    lines = ["# about capitals", question("France"), "", question("Italy"), question("France")]
    (store.path.parent / "questions.txt").write_text("\n".join(lines), encoding="utf-8")
    first = samples(client, question=None)
    assert (first["questions"], first["waiting"]) == (2, 2)
    ids = [answer["id"] for answer in first["answers"]]
    post_ranking(client, ids)
    second = samples(client, question=None)
    assert (second["questions"], second["waiting"]) == (2, 1)
    assert {first["prompt"][0]["content"], second["prompt"][0]["content"]} == {question("France"), question("Italy")}
    client.post("/feedback/skips", json={"annotator": WHO, "prompt": second["prompt"]}).raise_for_status()
    assert samples(client, question=None)["prompt"] is None
    # Another annotator gets the one that nobody has ranked; taken back, a ranking no longer counts.
    assert samples(client, question=None, annotator="annotator-two")["prompt"] == second["prompt"]
    client.post("/feedback/withdrawals", json={"id": "ranking-1", "annotator": WHO}).raise_for_status()
    assert samples(client, question=None)["prompt"] == first["prompt"]
    (store.path.parent / "questions.txt").unlink()
    assert samples(client, question=None)["questions"] == 0


@pytest.mark.parametrize(("line", "status"), [(question("Japan"), 409), ("and " * 999, 400)])
def test_a_question_that_cannot_be_ranked_is_named_and_can_be_skipped(
    client: TestClient, store: Store, line: str, status: int
) -> None:
    """It would come first for ever, as nobody ranks it: one answer alone, or a text that is too long."""
    (store.path.parent / "questions.txt").write_text(line, encoding="utf-8")
    refused = client.post("/feedback/samples", json={"annotator": WHO, "temperature": 0.0})
    assert (refused.status_code, refused.json()["prompt"]) == (status, [{"role": "user", "content": line.strip()}])
    for _ in range(2):  # sent again, it is skipped once
        skip = {"annotator": WHO, "prompt": refused.json()["prompt"]}
        client.post("/feedback/skips", json=skip).raise_for_status()
    assert samples(client, question=None)["prompt"] is None
    assert samples(client, question=None)["waiting"] == 1


def test_an_answer_comes_as_a_stream_and_can_be_judged(client: TestClient, store: Store) -> None:
    asked = {"messages": [{"role": "user", "content": question("Japan")}], "model": "other"}
    streamed = client.post("/feedback/answers", json=asked)
    assert streamed.headers["X-Bessemer-Model"] == OTHER
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line]
    assert "".join(event["text"] for event in events[:-1]) == answer("Japan")
    assert (events[-1]["model"], events[-1]["finish_reason"], events[-1]["problem"]) == (OTHER, "stop", None)
    asked_for = {"id": "opinion-1", "answer": events[-1]["id"], "opinion": "up", "annotator": WHO}
    client.post("/feedback/opinions", json=asked_for).raise_for_status()
    [kept] = store.opinions()
    assert (kept.response, kept.model, kept.opinion) == (answer("Japan"), OTHER, "up")
    assert store.rankings() == []


@pytest.mark.parametrize(
    ("route", "body", "status", "sentence"),
    [
        ("rankings", {"id": "ranking-1"}, 400, '"answers" is missing'),
        ("rankings", {"id": "ranking-1", "answers": ["a"], "ranks": ["2"], "annotator": WHO}, 400, "whole number; got"),
        ("rankings", {"id": "ranking-1", "answers": ["a", "b"], "ranks": [1, 2], "annotator": WHO}, 404, "no answer"),
        ("samples", {"annotator": WHO, "question": " "}, 400, '"question" is empty'),
        ("samples", {"annotator": WHO, "question": "Hi", "count": 7}, 400, '"count" must be less than or equal to 6'),
        ("samples", {"annotator": WHO, "question": "and " * 999}, 400, "too long"),
        ("samples", {"annotator": "<script>"}, 400, '"annotator" must be 8 to 64 letters'),
        ("opinions", {"id": "o" * 8, "answer": "x", "opinion": "up", "annotator": WHO}, 404, "no answer"),
        ("skips", {"annotator": WHO}, 400, '"prompt" is missing'),
        ("withdrawals", {"id": "ranking-9", "annotator": WHO}, 404, "no ranking"),
        ("answers", {"messages": []}, 400, "conversation is empty"),
        ("answers", {"messages": [{"role": "user", "content": "Hi"}], "seed": 2**53}, 400, '"seed" must be less than'),
    ],
)  # fmt: skip
def test_refusals_are_sentences(client: TestClient, route: str, body: Any, status: int, sentence: str) -> None:
    refused = client.post(f"/feedback/{route}", json=body)
    assert refused.status_code == status
    assert sentence in refused.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"}, 200),
        # To a plain HTTP address that is not this machine's, browsers say no more than where the page is from.
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://testserver"}, 200),
        ({}, 200),
    ],
)  # fmt: skip
def test_other_sites_pages_cannot_post(client: TestClient, headers: dict[str, str], status: int) -> None:
    answered = client.post("/feedback/samples", json={"annotator": WHO}, headers=headers)
    assert answered.status_code == status
    assert status == 200 or "own pages" in answered.json()["error"]


def test_without_a_store_models_still_answer(client: TestClient) -> None:
    client.app.state.store, client.app.state.store_problem = None, "The disk is full."  # type: ignore[attr-defined]
    refused = client.post("/feedback/samples", json={"annotator": WHO})
    assert (refused.status_code, refused.json()) == (503, {"error": "The disk is full."})
    asked = {"messages": [{"role": "user", "content": question("Japan")}]}
    last = json.loads(client.post("/feedback/answers", json=asked).text.splitlines()[-2][6:])
    assert (last["id"], last["problem"]) == (None, "The disk is full.")


@pytest.mark.parametrize("path", ["/", "/rank", "/api", "/provenance", "/assets/style.css"])
def test_pages_run_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    shown = client.get(path, headers={"Accept": "text/html"})
    assert shown.status_code == 200
    policy = shown.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in shown.text.replace("http://testserver", "")
    assert "<script>" not in shown.text
    assert shown.text.count('aria-current="page"') == (not path.startswith("/assets"))


def test_all_models_can_be_asked_at_once_where_there_are_more_than_two(client: TestClient) -> None:
    state = client.app.state  # type: ignore[attr-defined]
    assert "all the others" not in client.get("/").text
    state.models = {**state.models, "third": state.models["other"]}
    assert "all the others" in client.get("/").text


def test_lineage_is_readable_in_a_browser_and_tells_of_an_answer(client: TestClient, store: Store) -> None:
    [identifier] = store.add_answers(
        [{"role": "user", "content": "Is <b>this</b> text?"}], [("<script>alert(1)</script>", OTHER, 0.5, 7)]
    )
    shown = client.get(f"/provenance?answer={identifier}", headers={"Accept": "text/html"}).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "Is &lt;b&gt;this&lt;/b&gt; text?" in shown
    assert "temperature 0.5 with seed 7" in shown
    assert OTHER in shown
    assert client.get(f"/provenance?answer={identifier}").json() == {"model": OTHER}
    assert client.get("/provenance").json()["model"] == TAG
    of_package = client.get("/provenance", headers={"Accept": "text/html"}).text
    assert "000002.parquet, 000003.parquet, 000004.parquet and 1 before" in of_package
    missing = client.get("/provenance?answer=unknown", headers={"Accept": "text/html"})
    assert (missing.status_code, "There is no answer" in missing.text) == (404, True)
