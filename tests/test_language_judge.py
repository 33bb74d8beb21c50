"""A language model as the judge: both orders, ties, retries, clear errors, and verdicts that are asked for once."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common.defaults import read_settings
from tasks.common.evaluation.judge_model import JudgeModel
from tasks.common.evaluation.results import ResultStore
from tasks.common.harness.job import StageError
from tasks.common.settings import Checkpoints
from tasks.compare import language_judge
from tasks.compare import stage as compare
from tasks.compare.language_judge import judge_pairs, read_verdict
from tasks.compare.preferences import Pair
from tasks.rules.data import tables_by_source
from tasks.rules.gates import check_evaluations, check_keys, possible_figures
from tests.conftest import ROOT
from tests.test_compare import FIGURES, described, judged_rows, make_job, settings
from tests.training_fixtures import evaluations

NO_STORE = ResultStore({}, {})
Reply = Callable[[str], tuple[int, Any]]


class Endpoint:
    """An OpenAI-compatible endpoint: `reply` turns a prompt into a status and an answer."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.reply: Reply = lambda prompt: (200, "TIE")
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.headers.append(self.headers.get("Authorization"))
                status, answer = endpoint.reply(body["messages"][0]["content"])
                content = {"choices": [{"message": {"content": answer}}]} if isinstance(answer, str) else answer
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def judge(self, **changes: Any) -> JudgeModel:
        """Return settings of a judge at this endpoint."""
        url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return JudgeModel.model_validate({"url": url, "model": "m", "retries": 2, **changes})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(language_judge, "FIRST_PAUSE", 0.0)
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


def pair(before: str, after: str, number: int = 0) -> Pair:
    rows = [{"question": "Why?", "reply": text, "entity": f"e{number}"} for text in (before, after)]
    return Pair(f"q{number}", 0, rows[0], rows[1])


def prefer_good(prompt: str) -> tuple[int, str]:
    """Prefer the reply that says good, in whatever position."""
    first, second = prompt.split("[Reply B]")[0], prompt.split("[Reply B]")[1]
    if ("good" in first) == ("good" in second):
        return 200, "I think it is a TIE"
    return 200, f"The better one is: {'A' if 'good' in first else 'B'}."


def test_pairs_are_judged_in_both_orders(endpoint: Endpoint) -> None:
    endpoint.reply = prefer_good
    found = judge_pairs(endpoint.judge(), [pair("bad", "good"), pair("good", "bad"), pair("bad", "poor")], NO_STORE)
    assert [one["result"] for one in found] == [1.0, 0.0, 0.5]
    assert found[0]["verdicts"] == ["B", "A"]
    assert {request["temperature"] for request in endpoint.requests} == {0}
    assert len(endpoint.requests) == 4  # the second pair asks what the first one asked


def test_position_bias_cancels_out(endpoint: Endpoint) -> None:
    """A judge that always takes the first reply prefers nobody."""
    endpoint.reply = lambda prompt: (200, "A")
    [found] = judge_pairs(endpoint.judge(), [pair("bad", "good")], NO_STORE)
    assert found == {"verdicts": ["A", "A"], "result": 0.5}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("A", "A"), ("**B**", "B"), ("Reply A is long. Verdict: TIE", "TIE"), ("TIES", None), ("none", None), ("", None)],
)
def test_last_verdict_of_an_answer_counts(answer: str, verdict: str | None) -> None:
    assert read_verdict(answer) == verdict


def test_replies_with_placeholders_are_shown_as_they_are(endpoint: Endpoint) -> None:
    judge_pairs(endpoint.judge(prompt="{question}|{first}|{second}"), [pair("{second}", "x{first}y")], NO_STORE)
    prompts = {request["messages"][0]["content"] for request in endpoint.requests}
    assert prompts == {"Why?|{second}|x{first}y", "Why?|x{first}y|{second}"}


def test_temporary_failures_are_retried(endpoint: Endpoint) -> None:
    answers = iter([(503, {}), (429, {}), (200, "A"), (500, {}), (200, "B")])
    endpoint.reply = lambda prompt: next(answers)
    [found] = judge_pairs(endpoint.judge(parallel=1), [pair("bad", "good")], NO_STORE)
    assert found["verdicts"] == ["A", "B"]


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (503, {"error": "busy"}, r"did not answer in 3 attempts \(status 503: .*busy"),
        (401, {}, r"refused the API key \(401\): check the environment variable MY_KEY"),
        (404, {"error": "no such model"}, r"answered 404 with .*no such model.*expected an OpenAI-compatible"),
        (200, {"choices": []}, r"answered 200 with .*expected an OpenAI-compatible chat completion of the model m"),
        (200, "I cannot say.", r"gave no verdict in 2 of 2 answers, such as 'I cannot say\.'"),
    ],
)
def test_failures_are_one_clear_error(
    status: int, answer: Any, message: str, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint.reply = lambda prompt: (status, answer)
    with pytest.raises(StageError, match=message):
        judge_pairs(endpoint.judge(key_variable="MY_KEY"), [pair("bad", "good")], NO_STORE)
    assert endpoint.headers[0] == "Bearer secret"


def test_unreachable_judge_is_an_error(endpoint: Endpoint) -> None:
    judge = endpoint.judge(url="http://127.0.0.1:9/v1")
    with pytest.raises(StageError, match="did not answer in 3 attempts"):
        judge_pairs(judge, [pair("bad", "good")], NO_STORE)


def test_prompt_without_both_replies_is_a_settings_error(endpoint: Endpoint) -> None:
    with pytest.raises(ValidationError, match=r"it lacks \{second\}"):
        endpoint.judge(prompt="{question} {first}")


def test_compare_asks_once_and_keeps_the_verdicts(endpoint: Endpoint, tmp_path: Path) -> None:
    """A named evaluation has its own figure; a stopped stage and a new gate ask only for what is left."""
    endpoint.reply = prefer_good
    judge = {"kind": "judge", "against": "base", "by": endpoint.judge().model_dump(mode="json")}

    def run() -> dict[str, Any]:
        job = make_job(tmp_path, FIGURES)
        for key, figures in FIGURES.items():
            path = job.inputs[f"record of evaluate@{key}"]
            record = json.loads(path.read_text())
            if "encoder" not in key:
                record["metrics"] |= {"evaluations": {**described(figures), "gpt": {
                    "kind": "judge", "applies_to": "Models.", "means": {}}}, "gpt": {}}  # fmt: skip
            path.write_text(json.dumps(record))
        job.sections["evaluations"] = evaluations(gpt=judge)
        job.parts.update(code="c", inputs={str(path): "h" for path in job.inputs.values()})
        object.__setattr__(job, "checkpoints", Checkpoints(url=str(tmp_path / "store")))
        return compare.run(settings(), job)

    first = run()
    rows = {row["model"]: row for row in first["models"]}
    assert rows["policy"]["gpt"]["win_rate"] == 0.5  # the fixture's replies are all the same
    assert rows["policy"]["gpt"]["against"] == "base"
    assert rows["policy"]["win_rate"] == 1.0  # by the reward model
    assert rows["base"]["gpt"] == {}
    judgements = json.loads((tmp_path / "judgements.json").read_text())
    assert {(one["model"], one["against"]) for one in judgements} == {
        (model, "base") for model in ("tuned", "policy", "pruned", "int8")
    }
    asked = len(endpoint.requests)
    assert run() == first
    assert len(endpoint.requests) == asked
    assert len(judged_rows([0.0] * 4)) * 4 == len(judgements)


def test_judge_settings_are_checked_before_anything_runs(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model to compare with, its API key, and the models that can have a win rate."""
    params = read_settings(ROOT / "profiles/default.yaml")
    by = endpoint.judge(key_variable="MY_KEY").model_dump(mode="json")
    params["evaluations"]["gpt"] = {"kind": "judge", "against": "nobody", "by": by}
    assert ["evaluations.gpt.against: found 'nobody'" in problem for problem in check_evaluations(params)] == [True]
    params["evaluations"]["gpt"]["against"] = "base"
    assert list(check_evaluations(params)) == []
    [problem] = check_keys(params)
    assert "evaluations.gpt.by.key_variable: found 'MY_KEY'" in problem
    monkeypatch.setenv("MY_KEY", "secret")
    assert list(check_keys(params)) == []
    possible = possible_figures(params, tables_by_source(params))
    assert [name for name, figures in possible.items() if "gpt.win_rate" in (figures or [])] == [
        "tuned", "policy", "pruned", "chat",
    ]  # fmt: skip
