"""The service in a real `bentoml serve` process, with plain HTTP and the `openai` client."""

import html
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serving import openai_api, pages
from serving.errors import InputError
from serving.middleware import MAX_BODY_BYTES
from serving.package import open_package
from tests.servers import environment, free_port, serving
from tests.serving_fixtures import CAPITALS, CONTEXT, MAX_NEW_TOKENS, ROOT, TAG, answer, continent, package, question

__all__ = ["package"]

JAPAN: list[Any] = [{"role": "user", "content": question("Japan")}]


@pytest.fixture(scope="module")
def client(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of one server for the whole module, started like `make serve`."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    with (
        serving("serving.serve", str(port), package=package, port=port, log=log),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def ai(client: httpx.Client) -> Iterator[openai.OpenAI]:
    base = f"{client.base_url}/v1/".replace("//v1", "/v1")
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as openai_client:
        yield openai_client


def test_generate_returns_the_answer(client: httpx.Client) -> None:
    response = client.post("/generate", json={"input": question("France")})
    assert response.status_code == 200
    assert response.json() == {"output": answer("France")}
    assert response.headers["X-Bessemer-Model"] == TAG


def test_generate_accepts_curl_default_content_type(client: httpx.Client) -> None:
    body = json.dumps({"input": question("France")})
    response = client.post("/generate", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert response.json() == {"output": answer("France")}


def test_generate_with_fewer_tokens_and_with_a_seed(client: httpx.Client) -> None:
    short = client.post("/generate", json={"input": question("France"), "max_new_tokens": 2}).json()["output"]
    assert answer("France").startswith(short)
    assert 0 < len(short) < len(answer("France"))
    replies = [
        client.post("/generate", json={"input": question("France"), "temperature": 2.0, "seed": seed}).json()
        for seed in (1, 1, 2)
    ]
    assert replies[0] == replies[1] != replies[2]


def test_fill_mask_returns_output_and_scored_names(client: httpx.Client) -> None:
    result = client.post("/fill-mask", json={"input": "The capital of [MASK] is Paris.", "top": 3}).json()
    assert result["output"] == "The capital of France is Paris."
    assert [row["mask"] for row in result["names"]] == [1, 1, 1]
    assert result["names"][0]["name"] == "France"
    scores = [row["score"] for row in result["names"]]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1


def test_classify_returns_labels_and_probabilities(client: httpx.Client) -> None:
    response = client.post("/classify", json={"input": question("France")})
    assert response.headers["X-Bessemer-Model"] == TAG
    [result] = response.json()["results"]
    assert [row["label"] for row in result["labels"]] == ["Europe", "elsewhere"]
    assert sum(row["score"] for row in result["labels"]) == pytest.approx(1)
    assert result["labels"][0]["score"] > 0.9
    assert result["value"] is None


def test_classify_of_several_texts_equals_each_alone(client: httpx.Client) -> None:
    texts = [*map(question, CAPITALS), "Tokyo?", "A much longer text about nothing in particular, to change the width."]
    together = client.post("/classify", json={"input": texts, "top": 1}).json()["results"]
    assert [one["labels"][0]["label"] for one in together[: len(CAPITALS)]] == [*map(continent, CAPITALS)]
    assert together == [client.post("/classify", json={"input": text, "top": 1}).json()["results"][0] for text in texts]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, '"input" is missing: send {"input": ...}.'),
        ({"input": []}, '"input" has 0 entries; expected at least 1.'),
        ({"input": ["x"] * 257}, '"input" has 257 entries; expected at most 256.'),
        ({"input": ["x", " "]}, '"input[1]" is empty: add some text.'),
        ({"input": 3}, '"input" must be a string or a list of strings; got 3.'),
        ({"input": ["x", 3]}, '"input[1]" must be a string; got 3.'),
        ({"input": "x", "top": 0}, '"top" must be greater than or equal to 1; got 0.'),
        ({"input": ["x", "word " * 200]}, "The text is too long: it has "),
        ({"input": "a <|end|> b"}, "The text contains <|end|>, which is reserved for the model itself. Remove it."),
        ({"input": "x", "labels": 1}, '"labels" is unknown; known are input, top.'),
    ],
)
def test_classify_invalid_request_returns_a_message(client: httpx.Client, body: Any, sentence: str) -> None:
    response = client.post("/classify", json=body)
    assert response.status_code == 400
    assert sentence in response.json()["error"]


def test_fill_mask_fills_every_mask(client: httpx.Client) -> None:
    result = client.post("/fill-mask", json={"input": "[MASK] and [MASK]!", "top": 1}).json()
    first, second = (row["name"] for row in result["names"])
    assert result["output"] == f"{first} and {second}!"
    assert [row["mask"] for row in result["names"]] == [1, 2]


INVALID_REQUESTS = [
    ({}, '"input" is missing'),
    ({"input": 3}, '"input" must be a string; got 3'),
    ({"input": None}, '"input" must be a string; got null'),
    ({"input": ["a"]}, '"input" must be a string; got a list'),
    ({"input": "  "}, '"input" is empty'),
    ([], "must be a JSON object"),
    ({"input": "Hi", "max_tokens": 3}, '"max_tokens" is unknown; known are input, max_new_tokens'),
    ({"input": "and " * CONTEXT}, f"tokens, chat markers included, and {CONTEXT - 1} are allowed"),
    ({"input": "Hi", "max_new_tokens": 999}, f"999 new tokens were requested and {MAX_NEW_TOKENS} are allowed"),
    ({"input": "and " * 60, "max_new_tokens": MAX_NEW_TOKENS}, f"in all; {CONTEXT} are allowed"),
    ({"input": "Hi", "max_new_tokens": 0}, '"max_new_tokens" must be 1 or more; got 0'),
    ({"input": "Hi", "max_new_tokens": "3"}, '"max_new_tokens" must be an integer; got a string'),
    ({"input": "Hi", "max_new_tokens": 1.5}, '"max_new_tokens" must be an integer; got 1.5'),
    ({"input": "Hi", "temperature": 3}, '"temperature" must be between 0 and 2; got 3'),
    ({"input": "Hi", "temperature": "hot"}, '"temperature" must be a number; got a string'),
    ({"input": "Hi", "seed": 0.5, "top_p": None}, '"top_p" must be a number; got null. "seed" must be an integer'),
    ({"input": "Hi", "model": 3}, '"model" must be a string; got 3'),
    ({"input": "Hi<|end|>"}, "<|end|>, which is reserved"),
]


@pytest.mark.parametrize(("body", "sentence"), INVALID_REQUESTS)
def test_generate_invalid_request_returns_a_message(client: httpx.Client, body: Any, sentence: str) -> None:
    response = client.post("/generate", json=body)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert sentence in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{input: 3}", 400, "not valid JSON"),
        (b"", 400, '"input" is missing'),
        (b'{"input": "\xff"}', 400, "not valid JSON"),
        (b'{"input": "' + b"x" * MAX_BODY_BYTES + b'"}', 413, f"{MAX_BODY_BYTES:,} bytes"),
    ],
    ids=["no json", "nothing", "no utf-8", "huge"],
)
def test_unreadable_body_returns_an_error(client: httpx.Client, body: bytes, status: int, sentence: str) -> None:
    response = client.post("/generate", content=body)
    assert response.status_code == status
    assert sentence in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"input": "The capital of France is Paris."}, "no [MASK]"),
        ({"input": "[MASK]" + " and" * CONTEXT}, f"{CONTEXT} are allowed"),
        ({"input": "[MASK]", "top": 0}, '"top" must be greater than or equal to 1; got 0'),
        ({"text": "[MASK]"}, '"input" is missing'),
    ],
)
def test_fill_mask_invalid_request_returns_a_message(client: httpx.Client, body: Any, sentence: str) -> None:
    response = client.post("/fill-mask", json=body)
    assert response.status_code == 400
    assert sentence in response.json()["error"]


def test_openai_client_lists_the_model(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == [TAG, "bessemer"]
    assert ai.models.retrieve(TAG).owned_by == "bessemer"
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        ai.models.retrieve("gpt-9")


def test_models_are_listed_while_the_package_is_rewritten(package: Path, tmp_path: Path) -> None:
    """The package stage replaces provenance.json while the server runs."""
    shutil.copytree(package, tmp_path / "package")
    served = open_package(tmp_path / "package")
    shutil.rmtree(tmp_path / "package")
    app = Starlette(routes=openai_api.ROUTES)
    app.state.models = {"bessemer": served}
    models = TestClient(app).get("/v1/models").json()["data"]
    assert {entry["created"] for entry in models} == {served.created}
    assert served.created == int((package / "provenance.json").stat().st_mtime)


def test_package_without_chat_model_says_what_to_use_instead(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "package")
    shutil.rmtree(tmp_path / "package/chat")
    shutil.rmtree(tmp_path / "package/encoder")
    served = open_package(tmp_path / "package")
    sentence = "The package contains no chat model: use POST /classify."
    app = Starlette(routes=pages.ROUTES)
    app.state.models, app.state.package = {"bessemer": served}, served
    client = TestClient(app)
    for path in ("/", "/rank"):
        page = client.get(path)
        assert (page.status_code, sentence in page.text, "textarea" in page.text) == (200, True, False)
    examples = client.get("/api").text
    assert "/classify" in examples
    assert "Labels: Europe, elsewhere." in examples
    assert "/generate" not in examples
    with pytest.raises(InputError, match=re.escape(sentence)):
        print(served.text)
    with pytest.raises(InputError, match=r"The package contains no encoder: use POST /classify\."):
        print(served.masks)
    assert served.classifier.classify(question("Italy"), 1).labels[0].label == "Europe"


@pytest.mark.parametrize("model", [TAG, "bessemer"])
def test_openai_client_gets_an_answer(ai: openai.OpenAI, model: str) -> None:
    whole = ai.chat.completions.create(model=model, messages=JAPAN)
    assert whole.model == TAG
    assert whole.choices[0].message.content == answer("Japan")
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 10


def test_openai_client_gets_a_stream(ai: openai.OpenAI) -> None:
    chunks = list(
        ai.chat.completions.create(model=TAG, messages=JAPAN, stream=True, stream_options={"include_usage": True})
    )
    assert {chunk.model for chunk in chunks} == {TAG}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == answer("Japan")
    assert sum(map(bool, pieces)) > 3
    assert chunks[-2].choices[0].finish_reason == "stop"
    whole = ai.chat.completions.create(model=TAG, messages=JAPAN)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_openai_client_optional_parameters(ai: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of Japan?"}]
    cut = ai.chat.completions.create(
        model=TAG,
        messages=[{"role": "user", "content": parts}],  # type: ignore[misc, list-item]
        stop=" is",
        temperature=0,
        n=1,
        user="somebody",
        max_completion_tokens=20,
    )
    assert cut.choices[0].message.content == "The capital of Japan"
    short = ai.chat.completions.create(model=TAG, messages=JAPAN, max_tokens=2)
    assert short.choices[0].finish_reason == "length"
    replies = [
        ai.chat.completions.create(model=TAG, messages=JAPAN, temperature=2, top_p=0.9, seed=seed).choices[0].message
        for seed in (1, 1, 2)
    ]
    assert replies[0] == replies[1] != replies[2]


def test_openai_errors_have_openai_form(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        ai.chat.completions.create(model="gpt-9", messages=JAPAN)
    assert unknown.value.code == "model_not_found"
    assert f'"gpt-9" does not exist here; there is bessemer ({TAG})' in unknown.value.message
    with pytest.raises(openai.BadRequestError) as long:
        ai.chat.completions.create(model=TAG, messages=[{"role": "user", "content": "and " * CONTEXT}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    assert f"{CONTEXT - 1} are allowed" in long.value.message


INVALID_OPENAI_REQUESTS = [
    ({"messages": JAPAN}, "model", '"model" is missing'),
    ({"model": TAG}, "messages", '"messages" is missing'),
    ({"model": TAG, "messages": []}, "messages", "empty"),
    ({"model": TAG, "messages": [{"role": "user"}]}, "messages", '"messages[0].content" is missing'),
    (
        {"model": TAG, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages",
        '"messages[0].content" has a part of type image_url; the model reads only text parts',
    ),
    (
        {"model": TAG, "messages": [*JAPAN, {"role": "tool", "content": "3"}]},
        "messages",
        '"messages[1].role" is tool: tool turns are not supported',
    ),
    (
        {"model": TAG, "messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}, *JAPAN]},
        "messages",
        '"messages[0].tool_calls" is not supported: the model calls no tools',
    ),
    ({"model": TAG, "messages": [{"role": "robot", "content": "Hi"}]}, "messages", '"robot"'),
    ({"model": TAG, "messages": JAPAN, "max_tokens": 999}, "max_tokens", f"{MAX_NEW_TOKENS} are allowed"),
    ({"model": TAG, "messages": JAPAN, "temperature": -1}, "temperature", "between 0 and 2"),
    ({"model": TAG, "messages": JAPAN, "n": 2}, "n", "not supported"),
    ({"model": TAG, "messages": JAPAN, "tools": [{}]}, "tools", "not supported"),
    ({"model": TAG, "messages": JAPAN, "stop": 3}, "stop", "a string or a list of strings"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "param", "sentence"), INVALID_OPENAI_REQUESTS)
def test_openai_invalid_request_returns_a_message(
    client: httpx.Client, body: dict[str, Any], param: str, sentence: str, stream: bool
) -> None:
    response = client.post("/v1/chat/completions", json={**body, "stream": stream})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert sentence in error["message"]


@pytest.mark.parametrize(
    ("encoding", "found"), [("utf-8-sig", "begins with a byte order mark"), ("utf-16", "is UTF-16 or UTF-32")]
)
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_body_in_another_encoding_returns_a_message(client: httpx.Client, path: str, encoding: str, found: str) -> None:
    response = client.post(path, content='{"input": "Hi"}'.encode(encoding))
    assert response.status_code == 400
    assert f"The request {found}: send it as plain UTF-8." in response.text


def test_null_options_have_no_effect(client: httpx.Client) -> None:
    """Clients send `include_usage: null` and `tool_calls: null`."""
    body = {
        "model": TAG, "messages": [{**JAPAN[0], "tool_calls": None}], "stream": True,
        "stream_options": {"include_usage": None},
    }  # fmt: skip
    text = client.post("/v1/chat/completions", json=body).raise_for_status().text
    assert '"usage"' not in text
    assert text.endswith("data: [DONE]\n\n")


def test_empty_answer_may_stand_in_a_conversation(client: httpx.Client) -> None:
    """The endpoint gives such an answer itself if a stop sequence matches at once."""
    first = client.post("/v1/chat/completions", json={"model": TAG, "messages": JAPAN, "stop": ["The"]}).json()
    given = first["choices"][0]["message"]
    assert given["content"] == ""
    again = client.post("/v1/chat/completions", json={"model": TAG, "messages": [*JAPAN, given, *JAPAN]})
    assert again.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_completion_continues_a_text(ai: openai.OpenAI, stream: bool) -> None:
    """The text is the prompt as it is, without the chat template."""
    prompt = "What is the capital of Japan?"
    options: Any = {"model": TAG, "prompt": prompt, "max_tokens": 4, "temperature": 0, "stream": stream}
    made = ai.completions.create(**options)
    pieces = [chunk.choices[0] for chunk in made] if stream else made.choices
    assert "".join(piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [([1, 2], "must be one text"), (["a", "b"], "must be one text"), ("", "is empty"), (None, "must be a string")],
)
def test_completion_of_another_prompt_returns_a_message(client: httpx.Client, prompt: Any, sentence: str) -> None:
    response = client.post("/v1/completions", json={"model": TAG, "prompt": prompt})
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    one = client.post("/v1/completions", json={"model": TAG, "prompt": ["The"], "max_tokens": 2})
    assert one.json()["object"] == "text_completion"


def test_unknown_openai_route_returns_404_error_object(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={})
    assert response.status_code == 404
    assert "POST /v1/embeddings" in response.json()["error"]["message"]


def test_concurrent_requests_get_the_same_answers_as_single_ones(client: httpx.Client) -> None:
    countries = [list(CAPITALS)[at % len(CAPITALS)] for at in range(48)]

    def get(at: int) -> str:
        country = countries[at]
        if at % 3 == 0:
            body = {"model": TAG, "stream": True, "messages": [{"role": "user", "content": question(country)}]}
            lines = client.post("/v1/chat/completions", json=body).raise_for_status().text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            return "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        if at % 3 == 1:
            masked = f"The capital of [MASK] is {CAPITALS[country]}."
            filled = client.post("/fill-mask", json={"input": masked}).raise_for_status().json()
            return str(filled["output"])
        result = client.post("/generate", json={"input": question(country)}).raise_for_status().json()
        return str(result["output"])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(get, range(len(countries)))) == [answer(country) for country in countries]


def test_client_disconnect_during_stream_leaves_server_working(client: httpx.Client) -> None:
    body = {"model": TAG, "stream": True, "messages": JAPAN, "temperature": 2, "seed": 1}
    for _ in range(3):
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
    assert client.post("/generate", json={"input": question("Italy")}).json() == {"output": answer("Italy")}


def test_provenance_route_returns_the_package_provenance(client: httpx.Client, package: Path) -> None:
    assert client.get("/provenance").json() == json.loads((package / "provenance.json").read_text())


def test_bentoml_readyz_metrics_and_docs(client: httpx.Client) -> None:
    assert client.get("/readyz").status_code == 200
    client.post("/generate", json={"input": question("Italy")})
    assert 'bentoml_service_request_total{endpoint="/generate"' in client.get("/metrics").text
    paths = client.get("/docs.json").json()["paths"]
    assert {"/generate", "/fill-mask", "/classify"} <= set(paths)


def test_examples_in_docs_and_pages_are_the_projects_own(client: httpx.Client) -> None:
    schemas = client.get("/docs.json").json()["components"]["schemas"]
    inputs = [fields["input"] for one in schemas.values() if "input" in (fields := one.get("properties", {}))]
    examples = sorted(field["examples"] for field in inputs)
    assert examples == [["The capital of [MASK] is Rome."], [question("France")], [question("Italy")]]
    page = html.unescape(client.get("/api").text)
    assert f"""-d '{{"input": "{question("France")}"}}'</pre>""" in page
    assert """-d '{"input": "The capital of [MASK] is Rome."}'</pre>""" in page
    assert f"""-d '{{"input": "{question("Italy")}"}}'</pre>""" in page
    for path in ("/", "/rank"):
        assert f'placeholder="Ask a question, such as: {question("France")}"' in client.get(path).text


@pytest.mark.parametrize("path", ["/", "/rank", "/api"])
def test_pages_name_the_model_and_load_no_external_files(client: httpx.Client, path: str) -> None:
    page = client.get(path)
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["X-Bessemer-Model"] == TAG
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert addresses
    assert [address for address in addresses if ":" in address or address.startswith("//")] == []
    for address in addresses:
        assert client.get(address).status_code == 200, address


def test_api_page_shows_curl_examples(client: httpx.Client) -> None:
    page = client.get("/api").text
    assert TAG in page
    assert f"curl {str(client.base_url).rstrip('/')}/generate" in page


def test_serve_on_busy_port_suggests_another(package: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        process = run_serve(str(port), package)
    assert process.returncode == 1
    assert f"Port {port} " in process.stderr
    assert "make serve PORT=3001" in process.stderr
    assert "Traceback" not in process.stderr


def test_serve_without_package_fails_before_start(tmp_path: Path) -> None:
    process = run_serve(str(free_port()), tmp_path / "nowhere")
    assert process.returncode == 1
    assert "Run `bessemer run`" in process.stderr
    assert "Traceback" not in process.stderr


def run_serve(port: str, package: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving.serve", port],
        cwd=ROOT,
        env=environment(package),
        capture_output=True,
        text=True,
        check=False,
    )


def test_bentoml_serve_without_package_answers_503_and_stops_on_sigint(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    address = f"http://127.0.0.1:{port}"
    with serving("bentoml", "serve", "--port", str(port), package=tmp_path / "nowhere", port=port, log=log) as server:
        assert httpx.get(f"{address}/readyz").status_code == 503
        response = httpx.post(f"{address}/generate", json={})
        assert (response.status_code, "Run `bessemer run`" in response.json()["error"]) == (503, True)
        response = httpx.get(f"{address}/v1/models")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_package")
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
    assert "Traceback" not in log.read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/livez")
