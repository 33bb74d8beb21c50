"""Servers for tests: real processes on free ports, ended whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.serving_fixtures import ROOT


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(package: Path | None) -> dict[str, str]:
    """Return the environment of a process that serves a package; without one it serves what lies beside its code."""
    chosen = {} if package is None else {"BESSEMER_PACKAGE": str(package)}
    return {**{name: value for name, value in os.environ.items() if name != "BESSEMER_PACKAGE"}, **chosen}


@contextmanager
def serving(
    *command: str, package: Path | None, port: int, log: Path, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until it answers, and end it whatever happens."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=cwd,
            env=environment(package),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_up(server, port, log)
        yield server
    finally:
        end(server)


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server as Ctrl-C would, which reaches all of its group; then whatever is left of it and of its workers."""
    with suppress(subprocess.TimeoutExpired, ProcessLookupError):
        os.killpg(server.pid, signal.SIGINT)
        server.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return when the server takes requests; raise with its log where it ended instead."""
    while server.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/livez")
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the server ended with {server.returncode}:\n{log.read_text()}")
