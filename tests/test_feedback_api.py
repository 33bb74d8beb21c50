"""The feedback routes with a real model, in process: sampling, storing and validation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serving import pages
from serving.feedback import api as feedback_api
from serving.feedback.store import Store
from serving.package import Model, open_models, open_package
from serving.questions import Questions
from tests.serving_fixtures import TAG, answer, package, question

__all__ = ["package"]

ANNOTATOR = "annotator-one"
OTHER_TAG = "other-aaaaaaaaaaaa-bbbbbbbbbbbb"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    feedback_store = Store(tmp_path / "feedback")
    yield feedback_store
    feedback_store.close()


@pytest.fixture
def client(package: Path, store: Store) -> TestClient:
    """A client of the pages' routes, with the package and a second model of the same weights."""
    app = Starlette(routes=[*pages.ROUTES, *feedback_api.ROUTES])
    served = open_package(package)
    models = open_models(served)
    other = Model("other", served.folder, OTHER_TAG, {"model": OTHER_TAG}, served.created)
    app.state.package, app.state.models = served, {**models, "other": other}
    app.state.store, app.state.questions, app.state.store_problem = store, Questions(store), None
    return TestClient(app)


def samples(client: TestClient, **changes: Any) -> Any:
    body = {"annotator": ANNOTATOR, "question": question("France"), "count": 3, "temperature": 1.5, **changes}
    return client.post("/feedback/samples", json=body).raise_for_status().json()


def post_ranking(client: TestClient, answers: list[str], **changes: Any) -> Any:
    body = {"id": "ranking-1", "answers": answers, "ranks": list(range(1, len(answers) + 1)), "annotator": ANNOTATOR}
    return client.post("/feedback/rankings", json={**body, **changes})


def test_samples_are_anonymous_and_can_be_ranked(client: TestClient, store: Store) -> None:
    sampled = samples(client, count=6, temperature=2.0)
    assert sampled["prompt"] == [{"role": "user", "content": question("France")}]
    texts = [answer["text"] for answer in sampled["answers"]]
    assert len(set(texts)) == len(texts) == 6
    assert TAG not in json.dumps(sampled)
    assert OTHER_TAG not in json.dumps(sampled)
    ids = [answer["id"] for answer in sampled["answers"]]
    saved = post_ranking(client, ids, ranks=[2, 1, 1, 3, 4, 5]).json()["saved"]
    assert post_ranking(client, ids, ranks=[2, 1, 1, 3, 4, 5]).json()["saved"] == saved
    [ranking] = store.rankings()
    assert (ranking.responses, ranking.ranks) == (texts, [2, 1, 1, 3, 4, 5])
    assert set(ranking.models) == {OTHER_TAG, TAG}  # in turn, except where an answer repeats another


def test_samples_of_one_model_and_their_errors(client: TestClient) -> None:
    ids = [answer["id"] for answer in samples(client, models=["other"])["answers"]]
    assert set(post_ranking(client, ids).json()["saved"]["models"]) == {OTHER_TAG}
    same = client.post(
        "/feedback/samples", json={"annotator": ANNOTATOR, "question": question("France"), "temperature": 0.0}
    )
    assert (same.status_code, "always got the same answer" in same.json()["error"]) == (409, True)
    unknown = client.post("/feedback/samples", json={"annotator": ANNOTATOR, "question": "Hi", "models": ["gpt-9"]})
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
    client.post("/feedback/skips", json={"annotator": ANNOTATOR, "prompt": second["prompt"]}).raise_for_status()
    assert samples(client, question=None)["prompt"] is None
    # Another annotator gets the one that nobody has ranked; taken back, a ranking no longer counts.
    assert samples(client, question=None, annotator="annotator-two")["prompt"] == second["prompt"]
    client.post("/feedback/withdrawals", json={"id": "ranking-1", "annotator": ANNOTATOR}).raise_for_status()
    assert samples(client, question=None)["prompt"] == first["prompt"]
    (store.path.parent / "questions.txt").unlink()
    assert samples(client, question=None)["questions"] == 0


def test_prompts_of_the_project_wait_while_nobody_has_written_questions(store: Store) -> None:
    conversation = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
    ]  # fmt: skip
    prompts = [conversation, *([{"role": "user", "content": question(name)}] for name in ("France", "Italy", "France"))]
    questions, file = Questions(store, prompts), store.path.parent / "questions.txt"
    for written in (None, "# only a comment\n", "Written?\n", None):
        if written is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(written, encoding="utf-8")
        questions.refresh()
        assert questions.progress()["questions"] == (1 if written == "Written?\n" else 3)
    assert questions.next(ANNOTATOR) in prompts


def test_first_questions_are_offered_first(store: Store) -> None:
    prompts = [[{"role": "user", "content": f"Question {number}"}] for number in range(30)]
    questions = Questions(store, prompts)
    questions.refresh()
    offered = []
    while prompt := questions.next(ANNOTATOR):
        offered.append(prompts.index(prompt))
        questions.skip(prompt, ANNOTATOR)
    assert [sorted(offered[start : start + 10]) for start in (0, 10, 20)] == [
        list(range(start, start + 10)) for start in (0, 10, 20)
    ]


@pytest.mark.parametrize(("line", "status"), [(question("Japan"), 409), ("and " * 999, 400)])
def test_unrankable_question_is_returned_and_can_be_skipped(
    client: TestClient, store: Store, line: str, status: int
) -> None:
    """A question with one answer only, or one that is too long, must be skippable, or it stays first for ever."""
    (store.path.parent / "questions.txt").write_text(line, encoding="utf-8")
    response = client.post("/feedback/samples", json={"annotator": ANNOTATOR, "temperature": 0.0})
    assert (response.status_code, response.json()["prompt"]) == (status, [{"role": "user", "content": line.strip()}])
    for _ in range(2):  # sent again, it is skipped once
        skip = {"annotator": ANNOTATOR, "prompt": response.json()["prompt"]}
        client.post("/feedback/skips", json=skip).raise_for_status()
    assert samples(client, question=None)["prompt"] is None
    assert samples(client, question=None)["waiting"] == 1


def test_streamed_answer_can_be_rated(client: TestClient, store: Store) -> None:
    body = {"messages": [{"role": "user", "content": question("Japan")}], "model": "other"}
    streamed = client.post("/feedback/answers", json=body)
    assert streamed.headers["X-Bessemer-Model"] == OTHER_TAG
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line]
    assert "".join(event["text"] for event in events[:-1]) == answer("Japan")
    assert (events[-1]["model"], events[-1]["finish_reason"], events[-1]["problem"]) == (OTHER_TAG, "stop", None)
    asked_for = {"id": "opinion-1", "answer": events[-1]["id"], "opinion": "up", "annotator": ANNOTATOR}
    client.post("/feedback/opinions", json=asked_for).raise_for_status()
    [opinion] = store.opinions()
    assert (opinion.response, opinion.model, opinion.opinion) == (answer("Japan"), OTHER_TAG, "up")
    assert store.rankings() == []


@pytest.mark.parametrize(
    ("route", "body", "status", "sentence"),
    [
        ("rankings", {"id": "ranking-1"}, 400, '"answers" is missing'),
        (
            "rankings", {"id": "ranking-1", "answers": ["a"], "ranks": ["2"], "annotator": ANNOTATOR}, 400,
            "an integer; got",
        ),
        (
            "rankings", {"id": "ranking-1", "answers": ["a", "b"], "ranks": [1, 2], "annotator": ANNOTATOR}, 404,
            "no answer",
        ),
        ("samples", {"annotator": ANNOTATOR, "question": " "}, 400, '"question" is empty'),
        (
            "samples", {"annotator": ANNOTATOR, "question": "Hi", "count": 7}, 400,
            '"count" must be less than or equal to 6',
        ),
        ("samples", {"annotator": ANNOTATOR, "question": "and " * 999}, 400, "too long"),
        ("samples", {"annotator": "<script>"}, 400, '"annotator" must be 8 to 64 letters'),
        ("opinions", {"id": "o" * 8, "answer": "x", "opinion": "up", "annotator": ANNOTATOR}, 404, "no answer"),
        ("skips", {"annotator": ANNOTATOR}, 400, '"prompt" is missing'),
        ("withdrawals", {"id": "ranking-9", "annotator": ANNOTATOR}, 404, "no ranking"),
        ("answers", {"messages": []}, 400, "conversation is empty"),
        ("answers", {"messages": [{"role": "user", "content": "Hi"}], "seed": 2**53}, 400, '"seed" must be less than'),
    ],
)  # fmt: skip
def test_invalid_requests_get_a_message(client: TestClient, route: str, body: Any, status: int, sentence: str) -> None:
    response = client.post(f"/feedback/{route}", json=body)
    assert response.status_code == status
    assert sentence in response.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"}, 200),
        # For plain HTTP to another machine, browsers send only the page's origin.
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://testserver"}, 200),
        ({}, 200),
    ],
)  # fmt: skip
def test_cross_site_posts_are_rejected(client: TestClient, headers: dict[str, str], status: int) -> None:
    response = client.post("/feedback/samples", json={"annotator": ANNOTATOR}, headers=headers)
    assert response.status_code == status
    assert status == 200 or "own pages" in response.json()["error"]


def test_without_a_store_models_still_answer(client: TestClient) -> None:
    client.app.state.store, client.app.state.store_problem = None, "The disk is full."  # type: ignore[attr-defined]
    response = client.post("/feedback/samples", json={"annotator": ANNOTATOR})
    assert (response.status_code, response.json()) == (503, {"error": "The disk is full."})
    body = {"messages": [{"role": "user", "content": question("Japan")}]}
    last = json.loads(client.post("/feedback/answers", json=body).text.splitlines()[-2][6:])
    assert (last["id"], last["problem"]) == (None, "The disk is full.")


@pytest.mark.parametrize("path", ["/", "/rank", "/api", "/provenance", "/assets/style.css"])
def test_pages_load_no_external_scripts(client: TestClient, path: str) -> None:
    response = client.get(path, headers={"Accept": "text/html"})
    assert response.status_code == 200
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in response.text.replace("http://testserver", "")
    assert "<script>" not in response.text
    assert response.text.count('aria-current="page"') == (not path.startswith("/assets"))


def test_index_page_offers_all_models_when_there_are_three(client: TestClient) -> None:
    state = client.app.state  # type: ignore[attr-defined]
    assert "all the others" not in client.get("/").text
    state.models = {**state.models, "third": state.models["other"]}
    assert "all the others" in client.get("/").text


def test_provenance_page_shows_model_and_answer(client: TestClient, store: Store) -> None:
    [identifier] = store.add_answers(
        [{"role": "user", "content": "Is <b>this</b> text?"}], [("<script>alert(1)</script>", OTHER_TAG, 0.5, 7)]
    )
    page = client.get(f"/provenance?answer={identifier}", headers={"Accept": "text/html"}).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Is &lt;b&gt;this&lt;/b&gt; text?" in page
    assert "temperature 0.5 with seed 7" in page
    assert OTHER_TAG in page
    assert client.get(f"/provenance?answer={identifier}").json() == {"model": OTHER_TAG}
    assert client.get("/provenance").json()["model"] == TAG
    of_package = client.get("/provenance", headers={"Accept": "text/html"}).text
    assert "000002.parquet, 000003.parquet, 000004.parquet and 1 more" in of_package
    missing = client.get("/provenance?answer=unknown", headers={"Accept": "text/html"})
    assert (missing.status_code, "There is no answer" in missing.text) == (404, True)
