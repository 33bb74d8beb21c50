"""Continuous batching: one thread steps OpenVINO GenAI's pipeline and passes each request its tokens.

A request joins the batch at the next step and leaves it when it is finished or cancelled. The thread runs while there
are requests. A step releases the GIL, so that other threads keep running.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from serving.errors import InputError

if TYPE_CHECKING:
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, GenerationHandle

REMEDY = "Try again; if it fails again, restart the service."
MAX_RESTARTS = 100  # per request; after that many it is reported as too large for the KV cache


class Request:
    """One request in the batch. Its tokens can be read from any thread and any event loop.

    `submit` adds it to the engine; it is called again if the engine drops the request.
    """

    def __init__(self, submit: Callable[[], "GenerationHandle"]) -> None:
        self._submit = submit
        self._handle = submit()
        self._restarts = 0
        self._repeated_tokens = 0  # tokens that the engine will generate again after a restart
        self._cancelled = False
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._num_taken = 0
        self._ended = False
        self._failure: InputError | None = None
        self._wake: Callable[[], object] = bool  # wakes an event loop that waits for tokens

    def take(self, *, whole: bool = False) -> list[int]:
        """Wait for new tokens and return them; an empty list is the end. `whole`: wait for the end, return all."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready(whole))
            return self._take_new()

    async def take_async(self, *, whole: bool = False) -> list[int]:
        """Like `take`, without blocking the event loop."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = lambda: self._ready(whole) and loop.call_soon_threadsafe(woken.set)
            if self._ready(whole):
                return self._take_new()
        await woken.wait()
        with self._changed:
            return self._take_new()

    def cancel(self) -> None:
        """Remove the request from the batch; no effect if it has ended."""
        self._cancelled = True
        if not self._ended:
            self._handle.cancel()

    def collect(self) -> bool:
        """Collect the tokens of the last step; return whether the request has ended. Called by the stepping thread."""
        from openvino_genai import GenerationStatus

        status, found = self._handle.get_status(), list[int]()
        while self._handle.can_read():
            for output in self._handle.read().values():
                found += output.generated_ids
        self._repeated_tokens, found = max(self._repeated_tokens - len(found), 0), found[self._repeated_tokens :]
        dropped = status == GenerationStatus.IGNORED and not self._cancelled
        if dropped and self._restarts < MAX_RESTARTS:
            self._restart(found)
            return False
        ended = bool(status != GenerationStatus.RUNNING)
        if found or ended:
            self._change(found, ended, _cache_exceeded() if dropped else None)
        return ended

    def _restart(self, found: Sequence[int]) -> None:
        """Submit the request again.

        The engine drops all requests that wait for cache space when a step has nothing to run, as after the running
        requests were cancelled. The tokens generated so far are generated again and skipped.
        """
        self._change(found, False, None)
        self._restarts, self._repeated_tokens = self._restarts + 1, len(self._tokens)
        self._handle = self._submit()
        if self._cancelled:  # meanwhile
            self._handle.cancel()

    def fail(self, failure: InputError) -> None:
        """End with an error, which `take` raises."""
        self._change([], True, failure)

    def _change(self, tokens: Sequence[int], ended: bool, failure: InputError | None) -> None:
        with self._changed:
            self._tokens += tokens
            self._ended, self._failure = ended, failure
            self._changed.notify_all()
            with suppress(RuntimeError):  # the event loop has been closed
                self._wake()

    def _ready(self, whole: bool) -> bool:
        return self._ended or (not whole and len(self._tokens) > self._num_taken)

    def _take_new(self) -> list[int]:
        if self._failure:
            raise self._failure
        new, self._num_taken = self._tokens[self._num_taken :], len(self._tokens)
        return new


class Batch:
    """The requests of one pipeline. `make` creates the pipeline, and a new one after a failure."""

    def __init__(self, make: Callable[[], "ContinuousBatchingPipeline"]) -> None:
        self._make = make
        self._lock = threading.Lock()  # guards the fields below; never held during a step
        self._pipeline: ContinuousBatchingPipeline | None = make()
        self._requests: dict[int, Request] = {}
        self._numbers = count()
        self._thread: threading.Thread | None = None

    def add(self, requests: Sequence[tuple[Sequence[int], "GenerationConfig"]]) -> list[Request]:
        """Add requests, each (prompt ids, generation config), to the batch. Those of one call join at the same step."""
        import openvino

        with self._lock:
            self._pipeline = self._pipeline or self._make()
            added: list[Request] = []
            for prompt, config in requests:
                number = next(self._numbers)
                ids = openvino.Tensor(np.array([prompt], np.int64))
                added.append(Request(partial(self._pipeline.add_request, number, ids, config)))
                self._requests[number] = added[-1]
            if self._thread is None:
                # Not a daemon: the interpreter must wait for a running step, or the pipeline crashes at exit.
                self._thread = threading.Thread(target=self._run, args=(self._pipeline,), name="batch")
                self._thread.start()
        return added

    @property
    def busy(self) -> bool:
        """Whether the stepping thread is running."""
        return self._thread is not None

    def drain(self) -> None:
        """Cancel all requests and wait until the batch is empty."""
        with self._lock:
            thread, requests = self._thread, list(self._requests.values())
        for request in requests:
            request.cancel()
        if thread:
            thread.join()

    def _run(self, pipeline: "ContinuousBatchingPipeline") -> None:
        """Step until no request is left: a pipeline freed with unfinished requests leaks their memory."""
        try:
            while self._has_work(pipeline):
                pipeline.step()
                for number, request in list(self._requests.items()):
                    if request.collect():
                        del self._requests[number]
        except Exception as error:  # the pipeline's state is unknown now
            self._fail_all(error)

    def _has_work(self, pipeline: "ContinuousBatchingPipeline") -> bool:
        with self._lock:
            if self._requests or pipeline.has_non_finished_requests():
                return True
            self._thread = None  # under the lock, so that the next `add` starts a thread
            return False

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            failed = list(self._requests.values())
            self._requests.clear()
            self._pipeline = self._thread = None
        failure = InputError(
            f"The model's engine failed ({error}). {REMEDY}", field="model", code="engine_failed", status=500
        )
        for request in failed:
            request.fail(failure)


def _cache_exceeded() -> InputError:
    message = "The request does not fit into the engine's cache. Shorten the input or ask for fewer tokens."
    return InputError(message, code="cache_exceeded", status=400)
