"""`bessemer ui`: Prefect's server with its web page; while it is up, runs of this project report to it."""

import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from flows import environment
from tasks.common.settings import BessemerError


def serve_ui(project: Path, host: str, port: int) -> NoReturn:
    """Become Prefect's server, or say why not."""
    refuse_taken(host, port, "bessemer ui --port")
    environment.prepare(project, console=True)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    os.environ.pop("PREFECT_API_URL", None)
    os.environ["PREFECT_UI_API_URL"] = "/api"  # the page asks where it comes from; otherwise it asks port 4200
    environment.note_server(project, f"{url}/api")
    print(f"Prefect's page: {url}   (Ctrl-C ends it; runs of this project report to it while it is up)", flush=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    os.execv(sys.executable, command)


def refuse_taken(host: str, port: int, option: str) -> None:
    """Raise a sentence where a port is taken: which one, and how to choose another."""
    if port_taken(host, port):
        raise BessemerError(f"Port {port} is taken by another program. Choose another: `{option} {port + 1}`.")


def port_taken(host: str, port: int) -> bool:
    """Return whether something listens on a port already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
