"""Reward functions: a reward model, a Python function, an HTTP endpoint, or people's rankings (DPO only).

A reward function reads text, so a reward model may have another tokenizer than the policy. It is called with a list of
prompts (each a list of messages) and the list of replies, and returns one finite number per reply. If it fails or
hangs, the run stops with the reward's name and the prompts' ids, and can be resumed.
"""

import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from tasks.align.timeouts import call_with_timeout
from tasks.common.harness.job import StageError
from tasks.common.reward.scoring import RewardInput, Scorer
from tasks.common.settings import Numerics, Settings
from tasks.common.text.chat import Message

MAX_FLOAT32 = 2.0**128 - 2.0**104  # float32
MAX_NAMED_PROMPTS = 8  # in an error
Prompts = Sequence[Sequence[Message]]


class RewardError(StageError):
    """A reward function failed; the message names it and the prompts."""


class RewardFn(Protocol):
    """A reward function."""

    def __call__(self, prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
        """Return the reward of each reply to its prompt; higher is better."""
        ...


class Model(Settings):
    """A reward model: a folder written by the stage `reward`."""

    name: Literal["model"] = Field(description="Kind of reward")
    path: str = Field(description="Folder of the reward model", min_length=1)
    normalized: bool = Field(
        default=False,
        description="Normalize to mean 0 and variance 1 on the training responses; else the raters' scale",
    )
    disagreement: float = Field(
        default=0.0, description="Penalty per unit of standard deviation between the model's heads", ge=0
    )


class Function(Settings):
    """A user-defined Python function."""

    name: Literal["function"] = Field(description="Kind of reward")
    path: str = Field(description="Python file in the project; part of the model's identity", pattern=r"\.py$")
    function: str = Field(
        default="reward", description="Name of the function: takes prompts and replies, returns numbers", min_length=1
    )


class Endpoint(Settings):
    """An HTTP service that answers a POST of `{"prompts": [...], "replies": [...]}` with `{"rewards": [...]}`."""

    name: Literal["endpoint"] = Field(description="Kind of reward")
    path: str = Field(
        description="JSON file in the project with the service's `url` and version; its bytes represent the service in "
        "the model's identity",
        pattern=r"\.json$",
    )


class Rankings(Settings):
    """People's rankings, for DPO: every pair in which one response beats the other; `episodes` / 2 per iteration."""

    name: Literal["rankings"] = Field(description="Kind of reward")
    path: Literal["data/validate/rankings"] = Field(description="Table of the rankings")
    judge_share: float = Field(
        default=0.3, description="Share of rankings reserved for judges, as in the entries of `reward`", ge=0, lt=1
    )
    input: RewardInput = Field(
        default="conversation",
        description="As in the entries of `reward`: it determines which rankings are the judges'",
    )


AnyReward = Model | Function | Endpoint | Rankings
Reward = Annotated[AnyReward, Field(discriminator="name", description="Reward of a reply")]


def open_reward(reward: AnyReward, path: Path, numerics: Numerics, seconds: float) -> RewardFn:
    """Return the reward function at `path`; raise StageError if it cannot be loaded.

    A call of a user's function or of a service is limited to `seconds`. Rankings contain no reply of the policy, so
    their reward function returns 0 for every reply.
    """
    if isinstance(reward, Rankings):
        return _zero_rewards
    if isinstance(reward, Model):
        scorer = Scorer.load(path, numerics)

        def score(prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
            exchanges = list(zip(prompts, replies, strict=True))
            scores, head_deviations = scorer.score_with_std(exchanges, normalized=reward.normalized)
            return [
                score - reward.disagreement * deviation
                for score, deviation in zip(scores, head_deviations, strict=True)
            ]

        return score
    if isinstance(reward, Function):
        return with_timeout(_load_function(path, reward.function), seconds)
    return with_timeout(_make_endpoint_fn(path, seconds), seconds)


def with_timeout(reward_fn: RewardFn, seconds: float) -> RewardFn:
    """Return the reward function with a time limit: it raises TimeoutError after `seconds`."""

    def limited(prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
        # A generator computes when it is iterated, so it is consumed within the time limit.
        return call_with_timeout(lambda: list(reward_fn(prompts, replies)), seconds)

    return limited


def compute_rewards(
    reward_fn: RewardFn, reward_name: str, ids: Sequence[str], prompts: Prompts, replies: Sequence[str]
) -> list[float]:
    """Return the rewards of replies; raise RewardError, which names the reward and the prompts' ids, if it fails.

    `reward_name` is the reward's name in the settings; `ids` are the prompts' ids in the instructions table.
    """
    try:
        returned = reward_fn(prompts, replies)
        rewards = [float(value) for value in returned]
    except Exception as error:  # of the user's code or service
        raise _reward_error(reward_name, ids, f"{type(error).__name__}: {error}") from error
    if len(rewards) != len(replies):
        raise _reward_error(reward_name, ids, f"it returned {len(rewards)} rewards for {len(replies)} replies")
    bad_ids = [name for name, value in zip(ids, rewards, strict=True) if not abs(value) <= MAX_FLOAT32]
    if bad_ids:
        raise _reward_error(
            reward_name, bad_ids, f"{len(bad_ids)} of its {len(rewards)} rewards are not finite float32 numbers"
        )
    return rewards


def name_of(reward: AnyReward) -> str:
    """Return the reward's name for error messages."""
    return f"{reward.path}:{reward.function}" if isinstance(reward, Function) else reward.path


def _reward_error(reward_name: str, ids: Sequence[str], why: str) -> RewardError:
    more = f" and {len(ids) - MAX_NAMED_PROMPTS} more" if len(ids) > MAX_NAMED_PROMPTS else ""
    return RewardError(
        f"the reward {reward_name} could not be used: {why}. The prompts: {', '.join(ids[:MAX_NAMED_PROMPTS])}{more}. "
        "Expected a finite number for each reply. Progress is saved: rerun to resume from here with the same reward, "
        "if needed with a larger placement.timeouts.reward_seconds. A changed file counts as another reward, with "
        "which training starts over."
    )


def _zero_rewards(prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
    return [0.0] * len(replies)


def _load_function(path: Path, name: str) -> RewardFn:
    """Run a Python file and return one of its functions."""
    spec = importlib.util.spec_from_file_location(f"bessemer_reward_{path.stem}", path)
    assert spec is not None  # the settings require a name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of the user's code
        raise StageError(f"the reward's file {path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise StageError(f"{path} has no function {name!r} (align.reward.function).")
    reward_fn: RewardFn = found
    return reward_fn


def _make_endpoint_fn(path: Path, timeout: float) -> RewardFn:
    """Return a function that posts to the service named in a JSON file."""
    try:
        url = json.loads(path.read_text(encoding="utf-8"))["url"]
        problem = "" if str(url).startswith(("http://", "https://")) else f"found the url {url!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"found {type(error).__name__}: {error}"
    if problem:
        raise StageError(f"expected a JSON object with the `url` of an HTTP service in {path}, {problem}.")

    def post(prompts: Prompts, replies: Sequence[str]) -> Sequence[float]:
        body = json.dumps({"prompts": [list(messages) for messages in prompts], "replies": list(replies)}).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                found: Mapping[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()  # the error is a response too and keeps the connection open
            raise
        rewards: Sequence[float] = found["rewards"]
        return rewards

    return post
