"""Several models at one endpoint: selection by name or tag, provenance, and errors."""

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
from serving.feedback.store import FEEDBACK_VARIABLE
from serving.package import MODELS_VARIABLE, choose, open_models, open_package
from serving.serve import served_models
from tasks.common.settings import BessemerError
from tests.servers import free_port, serving
from tests.serving_fixtures import TAG, answer, package, question

__all__ = ["package"]

BRIEF, BRIEF_TOKENS = "brief-aaaaaaaaaaaa-bbbbbbbbbbbb", 2


@pytest.fixture(scope="module")
def brief(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model: the same weights under another tag, with answers of at most two tokens."""
    folder = tmp_path_factory.mktemp("models") / "brief"
    shutil.copytree(package / "chat", folder / "chat")
    limits = json.loads((folder / "chat/limits.json").read_text())
    (folder / "chat/limits.json").write_text(json.dumps({**limits, "max_new_tokens": BRIEF_TOKENS}))
    (folder / "provenance.json").write_text(json.dumps({"model": BRIEF, "stages": [{"stage": "finetune"}]}))
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log"


@pytest.fixture(scope="module")
def client(package: Path, brief: Path, log: Path) -> Iterator[httpx.Client]:
    """A client of one server with both models; the second is passed as by `bessemer serve --with`."""
    port = free_port()
    with (
        pytest.MonkeyPatch.context() as patch,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        patch.setenv(MODELS_VARIABLE, json.dumps({"brief": str(brief)}))
        with serving("serving.serve", str(port), package=package, port=port, log=log):
            yield client


@pytest.mark.parametrize("name", ["brief", BRIEF])
def test_generate_selects_model_by_name_or_tag(client: httpx.Client, name: str) -> None:
    default = client.post("/generate", json={"input": question("Japan")})
    assert (default.json()["output"], default.headers["X-Bessemer-Model"]) == (answer("Japan"), TAG)
    other = client.post("/generate", json={"input": question("Japan"), "model": name})
    assert answer("Japan").startswith(other.json()["output"])
    assert len(other.json()["output"]) < len(answer("Japan"))
    assert other.headers["X-Bessemer-Model"] == BRIEF


@pytest.mark.parametrize("stream", [False, True])
def test_openai_request_selects_model(client: httpx.Client, stream: bool) -> None:
    messages = [{"role": "user", "content": question("Japan")}]
    response = client.post(
        "/v1/chat/completions", json={"model": "brief", "messages": messages, "stream": stream}
    ).raise_for_status()
    assert response.headers.get_list("X-Bessemer-Model") == [BRIEF]
    assert f'"model":"{BRIEF}"' in response.text.replace('": "', '":"')
    assert '"length"' in response.text


def test_model_list_contains_tags_and_names(client: httpx.Client) -> None:
    model_ids = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert model_ids == [TAG, "bessemer", BRIEF, "brief"]
    response = client.get("/v1/models/brief")
    assert (response.json()["id"], response.headers["X-Bessemer-Model"]) == ("brief", BRIEF)


def test_provenance_selects_model_by_name_or_tag(client: httpx.Client, package: Path, brief: Path) -> None:
    for query, folder in (("", package), ("?model=brief", brief), (f"?model={BRIEF}", brief)):
        expected = json.loads((folder / "provenance.json").read_text())
        response = client.get(f"/provenance{query}")
        assert response.json() == expected
        assert response.headers["X-Bessemer-Model"] == expected["model"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/generate", {"input": "Hi", "model": "gpt-9"}),
        ("POST", "/v1/chat/completions", {"model": "gpt-9", "messages": [{"role": "user", "content": "Hi"}]}),
        ("GET", "/provenance?model=gpt-9", None),
        ("GET", "/v1/models/gpt-9", None),
    ],
)
def test_unknown_model_error_lists_available_models(client: httpx.Client, method: str, path: str, body: Any) -> None:
    response = client.request(method, path, json=body)
    assert response.status_code == 404
    error = response.json()["error"]
    sentence = error if isinstance(error, str) else error["message"]
    assert sentence == f'The model "gpt-9" does not exist here; there are bessemer ({TAG}), brief ({BRIEF}).'


def test_log_reports_memory_of_each_model(client: httpx.Client, log: Path) -> None:
    client.get("/readyz").raise_for_status()
    log_text = log.read_text()
    for model in (f"bessemer ({TAG})", f"brief ({BRIEF})"):
        assert f"{model}: " in log_text
    assert log_text.count("MB of weights, loaded in") == 2


def test_open_models_without_variable_gives_only_the_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODELS_VARIABLE, raising=False)
    packaged = open_package(package)
    models = open_models(packaged)
    assert list(models) == ["bessemer"]
    assert choose(models, None) is choose(models, "bessemer") is choose(models, TAG) is packaged
    with pytest.raises(InputError, match=rf"\"brief\" does not exist here; there is bessemer \({TAG}\)\."):
        choose(models, "brief")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("tuned", "BESSEMER_MODELS must be a JSON object"),
        ('["tuned"]', "BESSEMER_MODELS must be a JSON object"),
        ('{"tuned": 3}', "BESSEMER_MODELS must be a JSON object"),
        ('{"bessemer": "/tmp"}', "without the name 'bessemer'"),
        ('{"tuned": "/nowhere/at/all"}', "no model 'tuned' at /nowhere/at/all"),
    ],
)
def test_invalid_models_variable_is_rejected(
    package: Path, monkeypatch: pytest.MonkeyPatch, value: str, sentence: str
) -> None:
    monkeypatch.setenv(MODELS_VARIABLE, value)
    with pytest.raises(PackageError, match=sentence):
        open_models(open_package(package))


@pytest.mark.parametrize("part", ["provenance.json", "chat/openvino_model.xml"])
def test_model_with_missing_file_is_rejected(
    package: Path, brief: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    shutil.copytree(brief, tmp_path / "brief")
    (tmp_path / "brief" / part).unlink()
    monkeypatch.setenv(MODELS_VARIABLE, json.dumps({"brief": str(tmp_path / "brief")}))
    with pytest.raises(PackageError, match=rf"{part} is missing"):
        open_models(open_package(package))


def test_rank_prints_page_address_and_question_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(project: Path, host: str, port: int, others: list[str], first: str) -> None:
        raise SystemExit(first)

    monkeypatch.setattr(endpoint, "serve", serve)
    monkeypatch.setenv(FEEDBACK_VARIABLE, str(tmp_path))
    port = free_port()
    with pytest.raises(SystemExit) as printed:
        endpoint.rank(Path(), "127.0.0.1", port, [])
    assert str(printed.value) == (
        f"Rank answers at http://localhost:{port}/rank, and then: bessemer rank export\n"
        f"The page offers the questions in {tmp_path / 'questions.txt'}, one per line; without any, prompts of the "
        "project's data."
    )


def test_rank_reuses_a_running_endpoint(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    port = client.base_url.port
    assert port
    assert served_models(port, "127.0.0.1") == served_models(port, "0.0.0.0") == [TAG, "bessemer", BRIEF, "brief"]
    endpoint.rank(Path(), "127.0.0.1", port, [])
    assert f"The endpoint is running. Rank answers at http://localhost:{port}/rank" in capsys.readouterr().out
    with pytest.raises(BessemerError, match=rf"on port {port} does not serve tuned, base: .*--port 3001"):
        endpoint.rank(Path(), "127.0.0.1", port, ["tuned", "base"])
    with pytest.raises(
        BessemerError, match="no additional model 'brief'; available are pretrain@causal, finetune@chat"
    ):
        endpoint.rank(Path(), "127.0.0.1", port, ["brief"])


def test_rank_rejects_port_of_another_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert served_models(port, "127.0.0.1") is None
        with pytest.raises(ServingError, match=f"Port {port} on 127.0.0.1 is taken by another program"):
            endpoint.rank(Path(), "127.0.0.1", port, [])
    assert served_models(free_port(), "127.0.0.1") is None
