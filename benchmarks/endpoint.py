"""A running server and clients that ask it: how long until it answers, and how many answers a second it gives.

Clients are threads of this process with one open connection each, so that what they cost is a few per cent of what
the server spends on an answer. Used by `benchmarks/serve.py`.
"""

import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Figures

HOST = "127.0.0.1"
PATIENCE_SECONDS = 120
GENERATE, CHAT = "/generate", "/v1/chat/completions"
BESSEMER = ("-c", "from flows.cli import main; main()", "serve", "--port", "{port}")  # what `bessemer serve` is
MODULE = ("-m", "serving.serve", "{port}")
TRANSFORMERS = ("-m", "transformers.commands.transformers_cli", "serve", "--port", "{port}", "--device", "cpu")


@contextmanager
def started(arguments: Sequence[str], question: str, route: str = GENERATE) -> Iterator[tuple[int, float]]:
    """Start a server and yield its port and the seconds until it gave its first answer; end it whatever happens."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, *(argument.format(port=port) for argument in arguments)],
            cwd=harness.ROOT, env={**os.environ, **harness.OFFLINE}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield port, first_answer(server, port, question, route, began, log)
        finally:
            end(server)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def first_answer(
    server: subprocess.Popen[bytes], port: int, question: str, route: str, began: float, log: Any
) -> float:
    """Return the seconds from `began` to a server's first answer; raise with what it said where none comes."""
    while server.poll() is None and time.perf_counter() - began < PATIENCE_SECONDS:
        with suppress(OSError, http.client.HTTPException, BenchmarkError):
            ask(http.client.HTTPConnection(HOST, port, timeout=PATIENCE_SECONDS), question, route)
            return time.perf_counter() - began
        time.sleep(0.02)
    log.seek(0)
    said = log.read().decode(errors="replace")[-2000:]
    raise BenchmarkError(f"the server gave no answer in {PATIENCE_SECONDS} s. It said:\n{said}")


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server as Ctrl-C would, then whatever is left of it."""
    with suppress(subprocess.TimeoutExpired):
        server.send_signal(signal.SIGINT)
        server.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def ask(connection: http.client.HTTPConnection, question: str, route: str) -> None:
    """Ask one question and wait for the whole answer, in a chat piece by piece; raise where there is none."""
    chat = {"model": "bessemer", "messages": [{"role": "user", "content": question}], "stream": True, "temperature": 0}
    body = json.dumps({"input": question} if route == GENERATE else chat)
    connection.request("POST", route, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200 or not content:
        raise BenchmarkError(f"{route} answered {response.status}: {content[:300].decode(errors='replace')}")


def load(port: int, route: str, questions: Sequence[str], clients: int, requests: int) -> Figures:
    """Ask `requests` questions from a number of clients at once, and return the rate and how long one waits."""
    waits: list[float] = []
    problems: list[Exception] = []

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE_SECONDS)
        try:
            for turn in range(number, requests, clients):
                began = time.perf_counter()
                ask(connection, questions[turn % len(questions)], route)
                waits.append(time.perf_counter() - began)
        except (OSError, http.client.HTTPException, BenchmarkError) as error:
            problems.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if problems:
        raise BenchmarkError(f"{len(problems)} of {clients} clients got no answer: {problems[0]}")
    late = statistics.quantiles(waits, n=20)[-1]
    return {
        "requests_per_second": requests / seconds,
        "median_ms": 1e3 * statistics.median(waits),
        "p95_ms": 1e3 * late,
    }


def package_folder() -> Path:
    """Return the package that is served here; raise BenchmarkError where there is none."""
    folder = harness.ROOT / "data" / "package"
    harness.needed(
        folder / "provenance.json", folder / "policy", remedy="run `bessemer run` first: it makes the package."
    )
    return folder
