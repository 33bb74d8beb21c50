"""Start a server and load it with clients: time to the first answer, and requests per second.

Clients are threads of this process with one open connection each, so that their cost is a few per cent of the server's
cost per answer. Used by `benchmarks/serve.py` and `benchmarks/ranking.py`.
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
TIMEOUT_SECONDS = 120
GENERATE_ROUTE, CHAT_ROUTE = "/generate", "/v1/chat/completions"
BESSEMER_COMMAND = (
    "-c",
    "from flows.cli import main; main()",
    "serve",
    "--port",
    "{port}",
)  # the `bessemer serve` command
MODULE_COMMAND = ("-m", "serving.serve", "{port}")
TRANSFORMERS_COMMAND = (
    "-c", "from transformers.cli.transformers import main; main()", "serve", "--port", "{port}", "--device", "cpu",
)  # fmt: skip


@contextmanager
def run_server(
    arguments: Sequence[str], question: str, route: str = GENERATE_ROUTE, *, project: Path = harness.ROOT
) -> Iterator[tuple[int, float]]:
    """Start a project's server, yield its port and the seconds to its first answer, and stop it at the end."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, *(argument.format(port=port) for argument in arguments)],
            cwd=project, env={**os.environ, **harness.OFFLINE}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield port, first_answer(server, port, question, route, began, log)
        finally:
            stop_server(server)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def first_answer(
    server: subprocess.Popen[bytes], port: int, question: str, route: str, began: float, log: Any
) -> float:
    """Return the seconds from `began` to the first answer; raise BenchmarkError with the server's output if none."""
    while server.poll() is None and time.perf_counter() - began < TIMEOUT_SECONDS:
        with suppress(OSError, http.client.HTTPException, BenchmarkError):
            ask(http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_SECONDS), question, route)
            return time.perf_counter() - began
        time.sleep(0.02)
    log.seek(0)
    output = log.read().decode(errors="replace")[-2000:]
    raise BenchmarkError(f"the server gave no answer in {TIMEOUT_SECONDS} s. Its output:\n{output}")


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """Stop a server with SIGINT, then kill its process group."""
    with suppress(subprocess.TimeoutExpired):
        server.send_signal(signal.SIGINT)
        server.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def ask(connection: http.client.HTTPConnection, question: str, route: str) -> None:
    """Ask one question and read the whole answer (streamed on the chat route); raise BenchmarkError on failure."""
    chat = {"model": "bessemer", "messages": [{"role": "user", "content": question}], "stream": True, "temperature": 0}
    body = json.dumps({"input": question} if route == GENERATE_ROUTE else chat)
    connection.request("POST", route, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    if response.status != 200 or not content:
        raise BenchmarkError(f"{route} answered {response.status}: {content[:300].decode(errors='replace')}")


def load(port: int, route: str, questions: Sequence[str], clients: int, requests: int) -> Figures:
    """Send `requests` questions from concurrent clients; return requests/s and latency percentiles."""
    waits: list[float] = []
    problems: list[Exception] = []

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_SECONDS)
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
    p95 = statistics.quantiles(waits, n=20)[-1]
    return {
        "requests_per_second": requests / seconds,
        "median_ms": 1e3 * statistics.median(waits),
        "p95_ms": 1e3 * p95,
    }


def package_folder() -> Path:
    """Return the package's folder; raise BenchmarkError if it does not exist."""
    folder = harness.ROOT / "data" / "package"
    harness.require_paths(
        folder / "provenance.json", folder / "chat", remedy="run `bessemer run` first: it makes the package."
    )
    return folder
