"""Where PPO's rewards come from: a reward model, a Python function, or an HTTP endpoint; `ppo.reward` says which.

Whatever it is reads text, so that it may have another tokenizer than the policy, and is called with a list of prompts
(each a list of messages) and the list of replies, and answers with as many finite numbers. One that does not, or hangs,
stops the run with its name and the prompts' ids; nothing of the run is lost.
"""

import importlib.util
import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from tasks.common.evaluation.scoring import Scorer
from tasks.common.settings import Numerics, Settings
from tasks.common.stage import StageError
from tasks.common.text.chat import Message

LARGEST = 2.0**128 - 2.0**104  # float32
NAMED = 8  # prompts that are named in an error
Prompts = Sequence[Sequence[Message]]


class RewardError(StageError):
    """A reward could not be had; its text names what was asked and the prompts."""


class Judge(Protocol):
    """What gives a reply its reward."""

    def __call__(self, prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
        """Return the reward of each reply to its prompt; more is better."""
        ...


class Model(Settings):
    """A reward model of this project's, or any folder that the stage `reward` has left."""

    name: Literal["model"] = Field(description="Kind of reward")
    path: str = Field(description="Folder of the reward model", min_length=1)
    normalised: bool = Field(description="Mean 0 and variance 1 on the training responses, not the raters' scale")
    disagreement: float = Field(description="Taken off for a standard deviation between the model's heads", ge=0)


class Function(Settings):
    """A function of the user's own."""

    name: Literal["function"] = Field(description="Kind of reward")
    path: str = Field(description="Python file in the project, a part of the model's identity", pattern=r"\.py$")
    function: str = Field(description="Its function: takes prompts and replies, returns numbers", min_length=1)
    timeout: float = Field(description="Seconds that one call may take", gt=0, exclude=True)  # changes no model


class Endpoint(Settings):
    """A service that answers `{"rewards": [...]}` to a POST of `{"prompts": [...], "replies": [...]}`."""

    name: Literal["endpoint"] = Field(description="Kind of reward")
    path: str = Field(
        description="JSON file in the project with its `url` and whatever says which version answers there: its bytes "
        "stand for the service in the model's identity",
        pattern=r"\.json$",
    )
    timeout: float = Field(description="Seconds that one call may take", gt=0, exclude=True)  # changes no model


Reward = Annotated[Model | Function | Endpoint, Field(discriminator="name")]


def open_judge(reward: Model | Function | Endpoint, path: Path, numerics: Numerics) -> Judge:
    """Return the judge of some settings, which lies at `path`; raise StageError where it cannot be asked."""
    if isinstance(reward, Model):
        scorer = Scorer.load(path, numerics)

        def judge(prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
            exchanges = list(zip(prompts, replies, strict=True))
            scores, apart = scorer.judge(exchanges, normalised=reward.normalised)
            return [score - reward.disagreement * other for score, other in zip(scores, apart, strict=True)]

        return judge
    if isinstance(reward, Function):
        return InTime(_function(path, reward.function), reward.timeout)
    return InTime(_endpoint(path, reward.timeout), reward.timeout)


@dataclass(frozen=True)
class InTime:
    """A judge that answers in time or not at all: it is asked in a thread, which cannot be ended but be left."""

    judge: Judge
    seconds: float

    def __call__(self, prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
        """Return what the judge answers; raise TimeoutError where it takes longer than it may."""
        answered: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answered.put((list(self.judge(prompts, replies)), None))  # a generator works when it is read
            except Exception as error:  # whatever the user's code raises is told with its name, below
                answered.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            found, error = answered.get(timeout=self.seconds)
        except queue.Empty:
            raise TimeoutError(f"it has not answered within {self.seconds:g} s") from None
        if error:
            raise error
        rewards: Sequence[float] = found
        return rewards


def rated(judge: Judge, called: str, ids: Sequence[str], prompts: Prompts, replies: Sequence[str]) -> list[float]:
    """Return the rewards of replies; raise StageError with the judge's name and the prompts' ids where they are none.

    `called` is how the settings name the judge, `ids` are the prompts' in the table of instructions.
    """
    try:
        found = judge(prompts, replies)
        rewards = [float(value) for value in found]
    except Exception as error:  # of the user's code or service
        raise _unusable(called, ids, f"{type(error).__name__}: {error}") from error
    if len(rewards) != len(replies):
        raise _unusable(called, ids, f"it returned {len(rewards)} rewards for {len(replies)} replies")
    wrong = [name for name, value in zip(ids, rewards, strict=True) if not abs(value) <= LARGEST]
    if wrong:
        raise _unusable(called, wrong, f"{len(wrong)} of its {len(rewards)} rewards are no finite float32 numbers")
    return rewards


def called(reward: Model | Function | Endpoint) -> str:
    """Return how a reward is named in an error."""
    return f"{reward.path}:{reward.function}" if isinstance(reward, Function) else reward.path


def _unusable(called: str, ids: Sequence[str], why: str) -> RewardError:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return RewardError(
        f"the reward {called} could not be used: {why}. The prompts: {', '.join(ids[:NAMED])}{more}. Expected was a "
        "finite number for each reply. What was learnt so far is kept: the stage goes on from here with the same "
        "reward, be it with a longer timeout. A changed file is another reward, with which it begins anew."
    )


def _function(path: Path, name: str) -> Judge:
    """Return a function of a Python file, which is run once."""
    spec = importlib.util.spec_from_file_location(f"bessemer_reward_{path.stem}", path)
    assert spec is not None  # the settings want a name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of the user's code
        raise StageError(f"the reward's file {path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise StageError(f"{path} has no function {name!r} (ppo.reward.function).")
    judge: Judge = found
    return judge


def _endpoint(path: Path, timeout: float) -> Judge:
    """Return a function that asks the service which a JSON file names."""
    try:
        url = json.loads(path.read_text(encoding="utf-8"))["url"]
        wrong = "" if str(url).startswith(("http://", "https://")) else f"found the url {url!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = f"found {type(error).__name__}: {error}"
    if wrong:
        raise StageError(f"expected a JSON object with the `url` of an HTTP service in {path}, {wrong}.")

    def ask(prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
        body = json.dumps({"prompts": [list(messages) for messages in prompts], "replies": list(replies)}).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                found: Mapping[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()  # it is an answer too, and holds the connection
            raise
        rewards: Sequence[float] = found["rewards"]
        return rewards

    return ask
