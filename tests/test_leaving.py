"""Disconnected clients, cancelled requests, a full cache and a failed engine: other requests complete."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from serving import openai_api
from serving.batching import Batch
from serving.decoding import Answer, Sampling
from serving.engine import PreparedPrompt, TextEngine
from serving.errors import InputError
from serving.middleware import RequestMiddleware
from serving.package import Model
from tests.serving_fixtures import CAPITALS, CONTEXT, ROOT, TAG, answer, package, question

__all__ = ["package"]

LONG_REQUEST = PreparedPrompt([1, 5, 9], Sampling(temperature=2.0, seed=1), 40)


@pytest.fixture(scope="module")
def small_engine(package: Path) -> TextEngine:
    """An engine with a cache for little more than one whole context: four blocks of 32 tokens."""
    return TextEngine(package / "chat", 1, cache_blocks=-(-CONTEXT // 32) + 1)


def ask(country: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question(country)}]


def wait_until_idle(engine: TextEngine, seconds: float = 60) -> bool:
    """Wait until no request is running; return whether that is so."""
    end = time.monotonic() + seconds
    while engine.batch.busy and time.monotonic() < end:
        time.sleep(0.01)
    return not engine.batch.busy


def test_full_cache_queues_requests_and_completes_all(small_engine: TextEngine) -> None:
    """Forty requests need ten times the cache; each gets the same answer as alone."""
    countries = [list(CAPITALS)[at % len(CAPITALS)] for at in range(40)]
    answers = small_engine.start_all([small_engine.prepare(ask(country), Sampling()) for country in countries])
    assert [reply.finish().text for reply in answers] == [answer(country) for country in countries]


def test_disconnected_clients_under_cache_pressure_leave_others_unaffected(small_engine: TextEngine) -> None:
    """Streams dropped at their first piece, requests cancelled before they start, and requests that complete."""
    for _ in range(5):
        streams = [
            Answer(small_engine.tokenizer, request, 40, 3) for request in small_engine.submit_all([LONG_REQUEST] * 24)
        ]
        remaining = small_engine.start(ask("Japan"))
        for stream in streams[::3]:
            next(iter(stream), None)  # and its iterator is dropped
        for other in streams[1::3]:
            other.cancel()
        assert remaining.finish().text == answer("Japan")
        del streams
        assert wait_until_idle(small_engine)
    assert small_engine.generate(ask("Italy")).text == answer("Italy")


def test_cancelled_requests_free_the_cache_for_waiting_ones(small_engine: TextEngine) -> None:
    """With a full cache the engine takes a step without work, and would drop the waiting requests."""
    for _ in range(10):
        first = [small_engine.start(ask(country), Sampling(temperature=2.0, seed=1)) for country in CAPITALS]
        waiting = [small_engine.start(ask(country)) for country in CAPITALS]
        next(iter(first[0]), None)
        for other in first:
            other.cancel()
        assert [reply.finish().text for reply in waiting] == [answer(country) for country in CAPITALS]


def test_dropped_answer_is_cancelled(small_engine: TextEngine) -> None:
    running = small_engine.start(ask("Japan"), Sampling(temperature=2.0, seed=1))
    source = running._source
    del running
    assert wait_until_idle(small_engine)
    assert len(source.take(whole=True)) < 48


def test_batch_drain_stops_all_requests(small_engine: TextEngine) -> None:
    requests = small_engine.submit_all([LONG_REQUEST] * 12)
    small_engine.batch.drain()
    assert not small_engine.batch.busy
    assert all(len(request.take(whole=True)) <= 40 for request in requests)
    assert small_engine.generate(ask("Italy")).text == answer("Italy")


def test_exit_with_running_requests_prints_nothing(package: Path) -> None:
    """Requests that run when a program ends are cancelled first, without leaks and crashes."""
    program = f"""
from pathlib import Path
from serving.engine import PreparedPrompt, TextEngine
from serving.decoding import Sampling
engine = TextEngine(Path({str(package / "chat")!r}), 1)
engine.submit_all([PreparedPrompt([1, 5, 9], Sampling(temperature=2.0, seed=seed), 40) for seed in range(20)])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class FailingPipeline:
    """A pipeline with a given number of failing steps."""

    def __init__(self, real: Any, failures: list[int]) -> None:
        self.real, self.failures = real, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def step(self) -> None:
        if self.failures:
            self.failures.pop()
            raise RuntimeError("the processor is on fire")
        self.real.step()


def test_failed_engine_raises_and_is_rebuilt(package: Path) -> None:
    engine, failures, pipelines = TextEngine(package / "chat", 1), [1], []
    make: Callable[[], Any] = engine.batch._make

    def make_failing_pipeline() -> Any:
        pipelines.append(FailingPipeline(make(), failures))
        return pipelines[-1]

    engine.batch = Batch(make_failing_pipeline)
    for request in engine.start_all([engine.prepare(ask("Japan"), Sampling())] * 3):
        with pytest.raises(InputError, match=r"engine failed .*on fire") as caught:
            request.finish()
        assert (caught.value.status, caught.value.code) == (500, "engine_failed")
    assert engine.generate(ask("Italy")).text == answer("Italy")
    assert len(pipelines) == 2


class EndlessTokens:
    """A source of tokens that never yields any."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def take(self, *, whole: bool = False) -> list[int]:
        self.cancelled.wait()
        return []

    async def take_async(self, *, whole: bool = False) -> list[int]:
        await asyncio.Event().wait()
        raise AssertionError

    def cancel(self) -> None:
        self.cancelled.set()


@pytest.mark.parametrize("stop", [None, "x"])
@pytest.mark.parametrize("stream", [False, True])
def test_client_disconnect_cancels_the_request(
    package: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, stop: str | None
) -> None:
    """Streamed or not."""
    model, source = Model("bessemer", package, TAG, {}, 0), EndlessTokens()
    monkeypatch.setattr(model.text, "submit_all", lambda prompts: [source])
    app = Starlette(routes=openai_api.ROUTES)
    app.state.models = {"bessemer": model}
    body = {"model": TAG, "messages": ask("Japan"), "stream": stream, "stop": stop}
    pending = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if pending:
            return pending.pop()
        await asyncio.sleep(0.3)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope: Any = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"",
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(RequestMiddleware(app, {}, app.state)(scope, receive, send), 30))
    assert source.cancelled.wait(10)
