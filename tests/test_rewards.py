"""Rewards from a model, a function or a service; every error names the reward and the prompts."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.align import rewards
from tasks.align.rewards import Endpoint, Function, Model, RewardError, compute_rewards
from tasks.common.harness.job import StageError
from tasks.common.reward.scoring import Scorer
from tests.training_fixtures import NUMERICS, Chain, chain

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

IDS = ["q1", "q2"]
PROMPTS = [[{"role": "user", "content": "One?"}], [{"role": "user", "content": "Two?"}]]
REPLIES = ["Yes.", "Certainly not."]
REWARD_CODE = """
import time

def length(prompts, replies):
    return [len(prompt[-1]["content"]) + len(reply) / 100 for prompt, reply in zip(prompts, replies)]

def short(prompts, replies):
    return [1.0]

def nothing(prompts, replies):
    return [1.0, float("nan")]

def text(prompts, replies):
    return ["good", "bad"]

def broken(prompts, replies):
    raise KeyError("weights")

def hanging(prompts, replies):
    time.sleep(60)

def lazy(prompts, replies):
    for reply in replies:
        time.sleep(60)
        yield 1.0

def huge(prompts, replies):
    return [1.0, 1e39]
"""


def call_function(function: str, folder: Path, timeout: float = 30.0, code: str = REWARD_CODE) -> list[float]:
    """Return the rewards of a user-defined function."""
    path = folder / "mine.py"
    path.write_text(code, encoding="utf-8")
    reward = Function(name="function", path="data/mine.py", function=function)
    judge = rewards.open_reward(reward, path, NUMERICS, timeout)
    return compute_rewards(judge, rewards.name_of(reward), IDS, PROMPTS, REPLIES)


def test_a_function_is_given_prompts_and_replies(tmp_path: Path) -> None:
    """It sees the messages of a prompt and the text of a reply."""
    assert call_function("length", tmp_path) == [4.04, 4.14]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "it returned 1 rewards for 2 replies. The prompts: q1, q2."),
        ("nothing", "1 of its 2 rewards are not finite float32 numbers. The prompts: q2."),
        ("huge", "1 of its 2 rewards are not finite float32 numbers. The prompts: q2."),
        ("text", "ValueError: could not convert string to float: 'good'"),
        ("broken", "KeyError: 'weights'. The prompts: q1, q2."),
        ("hanging", "TimeoutError: it has not answered within 0.2 s. The prompts: q1, q2."),
        ("lazy", "TimeoutError: it has not answered within 0.2 s. The prompts: q1, q2."),
    ],
)
def test_an_invalid_reward_error_names_the_reward_and_prompts(function: str, message: str, tmp_path: Path) -> None:
    """It also says what was expected and how to resume."""
    with pytest.raises(RewardError) as caught:
        call_function(function, tmp_path, timeout=0.2 if function in ("hanging", "lazy") else 30.0)
    assert str(caught.value).startswith(f"the reward data/mine.py:{function} could not be used: ")
    assert message in str(caught.value)
    assert "a finite number for each reply" in str(caught.value)
    assert "resume from here with the same reward" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_like_it", "cannot be run: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def other(prompts, replies): ...", "has no function 'length'"),
        ("length = 3", "has no function 'length'"),
    ],
)
def test_a_file_without_the_function_is_rejected_at_load(code: str, message: str, tmp_path: Path) -> None:
    """Before anything is sampled."""
    with pytest.raises(StageError, match=message):
        call_function("length", tmp_path, code=code)


# A service


class Service(BaseHTTPRequestHandler):
    """A service with a configurable answer."""

    answer: Any = None
    seen: Any = None

    def do_POST(self) -> None:
        """Record the request and answer."""
        type(self).seen = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.answer == "slow":
            time.sleep(2)
        if self.answer == "error":
            self.send_error(500)
            return
        body = json.dumps(self.answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Path]:
    """Yield the JSON file of a running service."""
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = tmp_path / "judge.json"
    path.write_text(json.dumps({"url": f"http://127.0.0.1:{server.server_port}/rate", "version": "1"}))
    yield path
    server.shutdown()
    server.server_close()


def ask(path: Path, timeout: float = 30.0) -> list[float]:
    """Return the rewards of a service."""
    reward = Endpoint(name="endpoint", path="judge.json")
    reward_fn = rewards.open_reward(reward, path, NUMERICS, timeout)
    return compute_rewards(reward_fn, rewards.name_of(reward), IDS, PROMPTS, REPLIES)


def test_a_service_is_posted_prompts_and_replies(service: Path) -> None:
    """As JSON, and it answers in JSON."""
    Service.answer = {"rewards": [0.5, -1]}
    assert ask(service) == [0.5, -1.0]
    assert Service.seen == {"prompts": PROMPTS, "replies": REPLIES}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": [1, 2]}, "KeyError: 'rewards'"),
        ({"rewards": [1, 2, 3]}, "it returned 3 rewards for 2 replies"),
        ({"rewards": [1, None]}, "TypeError"),
        ("error", "HTTP Error 500"),
        ("slow", "within 0.3 s|timed out"),
    ],
)
def test_invalid_answers_of_a_service_are_errors(answer: Any, message: str, service: Path) -> None:
    """The error names the JSON file."""
    Service.answer = answer
    with pytest.raises(RewardError, match=rf"the reward judge\.json could not be used: .*({message}).*q1, q2"):
        ask(service, timeout=0.3 if answer == "slow" else 30.0)


@pytest.mark.parametrize("text", ["no JSON", "{}", "[]", '{"url": "file:///etc/passwd"}', '{"url": 5}'])
def test_a_file_without_a_service_url_is_rejected(text: str, tmp_path: Path) -> None:
    """A URL of another scheme, which might read a file, is rejected too."""
    path = tmp_path / "judge.json"
    path.write_text(text)
    with pytest.raises(StageError, match=r"expected a JSON object with the `url` of an HTTP service in .*, found"):
        ask(path)


def test_a_reward_model_returns_the_scorers_scores(chain: Chain) -> None:
    """With `disagreement`, the standard deviation of the heads is subtracted."""
    path = chain.path("data/reward/train/model")
    scorer, exchanges = Scorer.load(path, NUMERICS), list(zip(PROMPTS, REPLIES, strict=True))

    def model_rewards(normalized: bool, disagreement: float) -> Sequence[float]:
        reward = Model(name="model", path=str(path), normalized=normalized, disagreement=disagreement)
        return rewards.open_reward(reward, path, NUMERICS, 30.0)(PROMPTS, REPLIES)

    assert model_rewards(False, 0.0) == scorer.score(exchanges)
    assert model_rewards(True, 0.0) == scorer.score(exchanges, normalized=True)
    scores, deviations = scorer.score_with_std(exchanges)
    assert model_rewards(False, 2.0) == [
        score - 2 * deviation for score, deviation in zip(scores, deviations, strict=True)
    ]
