"""Several models at one endpoint: each is chosen by name or tag, and says what it was made from."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows import endpoint
from serving.errors import InputError, PackageError, ServingError
from serving.feedback import VARIABLE
from serving.package import OTHERS, choose, open_models, open_package
from serving.serve import running
from tasks.common.settings import BessemerError
from tests.servers import free_port, serving
from tests.serving_fixtures import TAG, answer, package, question

__all__ = ["package"]

BRIEF, BRIEF_TOKENS = "brief-aaaaaaaaaaaa-bbbbbbbbbbbb", 2


@pytest.fixture(scope="module")
def brief(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: the same weights under a tag of its own, and answers of two tokens at most."""
    folder = tmp_path_factory.mktemp("models") / "brief"
    shutil.copytree(package / "policy", folder / "policy")
    limits = json.loads((folder / "policy/limits.json").read_text())
    (folder / "policy/limits.json").write_text(json.dumps({**limits, "max_new_tokens": BRIEF_TOKENS}))
    (folder / "provenance.json").write_text(json.dumps({"model": BRIEF, "stages": [{"stage": "finetune"}]}))
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log"


@pytest.fixture(scope="module")
def client(package: Path, brief: Path, log: Path) -> Iterator[httpx.Client]:
    """A client of one server with both models, told of the second as `bessemer serve --with` tells it."""
    port = free_port()
    with (
        pytest.MonkeyPatch.context() as patch,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        patch.setenv(OTHERS, json.dumps({"brief": str(brief)}))
        with serving("serving.serve", str(port), package=package, port=port, log=log):
            yield client


@pytest.mark.parametrize("name", ["brief", BRIEF])
def test_a_request_chooses_its_model(client: httpx.Client, name: str) -> None:
    usual = client.post("/generate", json={"input": question("Japan")})
    assert (usual.json()["output"], usual.headers["X-Bessemer-Model"]) == (answer("Japan"), TAG)
    other = client.post("/generate", json={"input": question("Japan"), "model": name})
    assert answer("Japan").startswith(other.json()["output"])
    assert len(other.json()["output"]) < len(answer("Japan"))
    assert other.headers["X-Bessemer-Model"] == BRIEF


@pytest.mark.parametrize("stream", [False, True])
def test_openais_requests_choose_it_too(client: httpx.Client, stream: bool) -> None:
    messages = [{"role": "user", "content": question("Japan")}]
    answered = client.post(
        "/v1/chat/completions", json={"model": "brief", "messages": messages, "stream": stream}
    ).raise_for_status()
    assert answered.headers.get_list("X-Bessemer-Model") == [BRIEF]
    assert f'"model":"{BRIEF}"' in answered.text.replace('": "', '":"')
    assert '"length"' in answered.text


def test_all_are_listed_under_tag_and_name(client: httpx.Client) -> None:
    listed = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert listed == [TAG, "bessemer", BRIEF, "brief"]
    described = client.get("/v1/models/brief")
    assert (described.json()["id"], described.headers["X-Bessemer-Model"]) == ("brief", BRIEF)


def test_each_tells_what_it_was_made_from(client: httpx.Client, package: Path, brief: Path) -> None:
    for query, folder in (("", package), ("?model=brief", brief), (f"?model={BRIEF}", brief)):
        expected = json.loads((folder / "provenance.json").read_text())
        told = client.get(f"/provenance{query}")
        assert told.json() == expected
        assert told.headers["X-Bessemer-Model"] == expected["model"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/generate", {"input": "Hi", "model": "gpt-9"}),
        ("POST", "/v1/chat/completions", {"model": "gpt-9", "messages": [{"role": "user", "content": "Hi"}]}),
        ("GET", "/provenance?model=gpt-9", None),
        ("GET", "/v1/models/gpt-9", None),
    ],
)
def test_an_unknown_model_is_told_with_those_there_are(client: httpx.Client, method: str, path: str, body: Any) -> None:
    refused = client.request(method, path, json=body)
    assert refused.status_code == 404
    error = refused.json()["error"]
    sentence = error if isinstance(error, str) else error["message"]
    assert sentence == f'The model "gpt-9" does not exist here; there are bessemer ({TAG}), brief ({BRIEF}).'


def test_the_log_says_what_each_takes(client: httpx.Client, log: Path) -> None:
    client.get("/readyz").raise_for_status()
    told = log.read_text()
    for model in (f"bessemer ({TAG})", f"brief ({BRIEF})"):
        assert f"{model}: " in told
    assert told.count("MB of weights, loaded in") == 2


def test_a_package_alone_is_all_that_a_bento_has(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OTHERS, raising=False)
    opened = open_package(package)
    models = open_models(opened)
    assert list(models) == ["bessemer"]
    assert choose(models, None) is choose(models, "bessemer") is choose(models, TAG) is opened
    with pytest.raises(InputError, match=rf"\"brief\" does not exist here; there is bessemer \({TAG}\)\."):
        choose(models, "brief")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("tuned", "BESSEMER_MODELS must be a JSON object"),
        ('["tuned"]', "BESSEMER_MODELS must be a JSON object"),
        ('{"tuned": 3}', "BESSEMER_MODELS must be a JSON object"),
        ('{"bessemer": "/tmp"}', "none of them 'bessemer'"),
        ('{"tuned": "/nowhere/at/all"}', "no model 'tuned' at /nowhere/at/all"),
    ],
)
def test_a_wrong_list_of_models_is_told(
    package: Path, monkeypatch: pytest.MonkeyPatch, value: str, sentence: str
) -> None:
    monkeypatch.setenv(OTHERS, value)
    with pytest.raises(PackageError, match=sentence):
        open_models(open_package(package))


@pytest.mark.parametrize("part", ["provenance.json", "policy/model.onnx"])
def test_a_model_that_lacks_a_file_is_told(
    package: Path, brief: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    shutil.copytree(brief, tmp_path / "brief")
    (tmp_path / "brief" / part).unlink()
    monkeypatch.setenv(OTHERS, json.dumps({"brief": str(tmp_path / "brief")}))
    with pytest.raises(PackageError, match=rf"{part} is missing"):
        open_models(open_package(package))


def test_rank_says_where_its_page_is_and_where_questions_are_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(project: Path, host: str, port: int, others: list[str], first: str) -> None:
        raise SystemExit(first)

    monkeypatch.setattr(endpoint, "serve", serve)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    port = free_port()
    with pytest.raises(SystemExit) as told:
        endpoint.rank(Path(), "127.0.0.1", port, [])
    assert str(told.value) == (
        f"Rank answers at http://localhost:{port}/rank, and then: bessemer rank export\n"
        f"Questions that are to wait there, one a line: {tmp_path / 'questions.txt'}"
    )


def test_rank_finds_the_endpoint_that_runs_and_says_where_its_page_is(
    client: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    port = client.base_url.port
    assert port
    assert running(port, "127.0.0.1") == running(port, "0.0.0.0") == [TAG, "bessemer", BRIEF, "brief"]
    endpoint.rank(Path(), "127.0.0.1", port, [])
    assert f"The endpoint is up. Rank answers at http://localhost:{port}/rank" in capsys.readouterr().out
    with pytest.raises(BessemerError, match=rf"on port {port} answers without tuned, base: .*--port 3001"):
        endpoint.rank(Path(), "127.0.0.1", port, ["tuned", "base"])
    with pytest.raises(BessemerError, match="no model 'brief' to add; there are base, tuned"):
        endpoint.rank(Path(), "127.0.0.1", port, ["brief"])


def test_another_program_on_the_port_is_not_taken_for_the_endpoint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert running(port, "127.0.0.1") is None
        with pytest.raises(ServingError, match=f"Port {port} on 127.0.0.1 is taken by another program"):
            endpoint.rank(Path(), "127.0.0.1", port, [])
    assert running(free_port(), "127.0.0.1") is None
