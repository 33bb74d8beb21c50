"""Servers for tests: real processes on free ports, always stopped at the end."""

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

from tests.conftest import ROOT, offline


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(package: Path | None) -> dict[str, str]:
    """Return the environment of a server process; without a package it serves its default one."""
    chosen = {} if package is None else {"BESSEMER_PACKAGE": str(package)}
    return {**{name: value for name, value in os.environ.items() if name != "BESSEMER_PACKAGE"}, **chosen}


@contextmanager
def serving(
    *command: str, package: Path | None, port: int, log: Path, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, wait until it answers, and stop it at the end; fail if it connects to another machine."""
    record = log.with_name("connections")
    server_environment = offline(record, environment(package))
    if command[0] == "bentoml":  # called directly, so our code cannot turn its telemetry off
        server_environment["BENTOML_DO_NOT_TRACK"] = "True"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=cwd,
            env=server_environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_up(server, port, log)
        yield server
    finally:
        stop_server(server)
    assert not record.exists(), record.read_text()


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """Stop a server's process group with SIGINT, then kill what is left of it."""
    with suppress(subprocess.TimeoutExpired, ProcessLookupError):
        os.killpg(server.pid, signal.SIGINT)
        server.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until the server accepts requests; raise AssertionError with its log if it exits."""
    while server.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/livez")
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the server ended with {server.returncode}:\n{log.read_text()}")
