"""Rewards from a model, a function or a service; whatever goes wrong with one is told with its name and the prompts."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.common.alignment import rewards
from tasks.common.alignment.rewards import Endpoint, Function, Model, RewardError, rated
from tasks.common.evaluation.scoring import Scorer
from tasks.common.stage import StageError
from tests.training_fixtures import NUMERICS, Chain, chain

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

IDS = ["q1", "q2"]
PROMPTS = [[{"role": "user", "content": "One?"}], [{"role": "user", "content": "Two?"}]]
REPLIES = ["Yes.", "Certainly not."]
OWN = """
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


def asked(function: str, folder: Path, timeout: float = 30.0, code: str = OWN) -> list[float]:
    """Return what a function of the user's own says."""
    path = folder / "mine.py"
    path.write_text(code, encoding="utf-8")
    reward = Function(name="function", path="data/mine.py", function=function, timeout=timeout)
    judge = rewards.open_judge(reward, path, NUMERICS)
    return rated(judge, rewards.called(reward), IDS, PROMPTS, REPLIES)


def test_a_function_is_given_prompts_and_replies(tmp_path: Path) -> None:
    """It sees the messages of a prompt and the text of a reply."""
    assert asked("length", tmp_path) == [4.04, 4.14]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("short", "it returned 1 rewards for 2 replies. The prompts: q1, q2."),
        ("nothing", "1 of its 2 rewards are no finite float32 numbers. The prompts: q2."),
        ("huge", "1 of its 2 rewards are no finite float32 numbers. The prompts: q2."),
        ("text", "ValueError: could not convert string to float: 'good'"),
        ("broken", "KeyError: 'weights'. The prompts: q1, q2."),
        ("hanging", "TimeoutError: it has not answered within 0.2 s. The prompts: q1, q2."),
        ("lazy", "TimeoutError: it has not answered within 0.2 s. The prompts: q1, q2."),
    ],
)
def test_what_is_no_reward_stops_with_its_name_and_the_prompts(function: str, told: str, tmp_path: Path) -> None:
    """And says what was expected and that nothing is lost."""
    with pytest.raises(RewardError) as caught:
        asked(function, tmp_path, timeout=0.2 if function in ("hanging", "lazy") else 30.0)
    assert str(caught.value).startswith(f"the reward data/mine.py:{function} could not be used: ")
    assert told in str(caught.value)
    assert "a finite number for each reply" in str(caught.value)
    assert "goes on from here with the same reward" in str(caught.value)


def test_how_long_a_reward_may_take_is_no_part_of_the_model() -> None:
    """So a run that a slow one stopped goes on from its checkpoint under a longer limit."""
    for kind, path in ((Function, "mine.py"), (Endpoint, "judge.json")):
        settings: dict[str, Any] = {"name": kind.__name__.lower(), "path": path, "timeout": 3.0}
        reward = kind.model_validate(settings | ({"function": "rate"} if kind is Function else {}))
        assert reward.timeout == 3.0
        assert "timeout" not in reward.model_dump(mode="json")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import nothing_like_it", "cannot be run: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def other(prompts, replies): ...", "has no function 'length'"),
        ("length = 3", "has no function 'length'"),
    ],
)
def test_a_file_without_the_function_is_told_before_anything_is_sampled(code: str, told: str, tmp_path: Path) -> None:
    """When the judge is opened."""
    with pytest.raises(StageError, match=told):
        asked("length", tmp_path, code=code)


# A service


class Service(BaseHTTPRequestHandler):
    """Answers with whatever the test wants."""

    answer: Any = None
    seen: Any = None

    def do_POST(self) -> None:
        """Keep what was asked and answer."""
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
        """Say nothing."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Path]:
    """Yield the file that names a running service."""
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = tmp_path / "judge.json"
    path.write_text(json.dumps({"url": f"http://127.0.0.1:{server.server_port}/rate", "version": "1"}))
    yield path
    server.shutdown()
    server.server_close()


def ask(path: Path, timeout: float = 30.0) -> list[float]:
    """Return what a service says."""
    reward = Endpoint(name="endpoint", path="judge.json", timeout=timeout)
    return rated(rewards.open_judge(reward, path, NUMERICS), rewards.called(reward), IDS, PROMPTS, REPLIES)


def test_a_service_is_posted_prompts_and_replies(service: Path) -> None:
    """As JSON, and answers likewise."""
    Service.answer = {"rewards": [0.5, -1]}
    assert ask(service) == [0.5, -1.0]
    assert Service.seen == {"prompts": PROMPTS, "replies": REPLIES}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"scores": [1, 2]}, "KeyError: 'rewards'"),
        ({"rewards": [1, 2, 3]}, "it returned 3 rewards for 2 replies"),
        ({"rewards": [1, None]}, "TypeError"),
        ("error", "HTTP Error 500"),
        ("slow", "within 0.3 s|timed out"),
    ],
)
def test_what_a_service_gets_wrong_is_told(answer: Any, told: str, service: Path) -> None:
    """With the file that names it."""
    Service.answer = answer
    with pytest.raises(RewardError, match=rf"the reward judge\.json could not be used: .*({told}).*q1, q2"):
        ask(service, timeout=0.3 if answer == "slow" else 30.0)


@pytest.mark.parametrize("text", ["no JSON", "{}", "[]", '{"url": "file:///etc/passwd"}', '{"url": 5}'])
def test_a_file_that_names_no_service_is_told(text: str, tmp_path: Path) -> None:
    """An address of another kind, which might read a file, too."""
    path = tmp_path / "judge.json"
    path.write_text(text)
    with pytest.raises(StageError, match=r"expected a JSON object with the `url` of an HTTP service in .*, found"):
        ask(path)


def test_a_reward_model_is_one_of_them(chain: Chain) -> None:
    """Its rewards are the scores of the folder's scorer, less a price for how far its heads lie apart."""
    path = chain.path("data/reward/policy/model")
    scorer, exchanges = Scorer.load(path, NUMERICS), list(zip(PROMPTS, REPLIES, strict=True))

    def rewarded(normalised: bool, disagreement: float) -> Sequence[float]:
        reward = Model(name="model", path=str(path), normalised=normalised, disagreement=disagreement)
        return rewards.open_judge(reward, path, NUMERICS)(PROMPTS, REPLIES)

    assert rewarded(False, 0.0) == scorer.score(exchanges)
    assert rewarded(True, 0.0) == scorer.score(exchanges, normalised=True)
    scores, apart = scorer.judge(exchanges)
    assert rewarded(False, 2.0) == [score - 2 * other for score, other in zip(scores, apart, strict=True)]
