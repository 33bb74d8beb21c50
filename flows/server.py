"""`bessemer ui`: Prefect's server with its web page. While it runs, runs of this project report to it."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from flows import environment

PORT = 4200


def serve_ui(project: Path, host: str, port: int) -> NoReturn:
    """Replace this process by Prefect's server; raise ServingError if the port is in use."""
    from serving.serve import alternative_port, check_port

    check_port(port, host, f"Choose another: `bessemer ui --port {alternative_port(port, PORT)}`.")
    environment.prepare(project, console=True)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    os.environ.pop("PREFECT_API_URL", None)
    os.environ["PREFECT_UI_API_URL"] = "/api"  # a relative URL, because the default is port 4200
    environment.note_server(project, f"{url}/api")
    print(f"Prefect's page: {url}   (Ctrl-C stops it; runs of this project report to it while it runs)", flush=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    os.execv(sys.executable, command)
