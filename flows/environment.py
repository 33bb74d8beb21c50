"""Environment of Prefect for a run from the command line: less output, and a server that survives Ctrl-C.

Variables that the user has set are kept. Import Prefect only after `prepare`: it reads its settings on import.
"""

import os
import signal
import threading
from pathlib import Path

from flows.records import read_json
from tasks.common import proxies
from tasks.common.harness.records import write_json
from tasks.common.settings import BessemerError

SERVER_NOTE = Path(".bessemer/server.json")
QUIET_VARIABLES = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",  # 20 by default, too short on a small, busy machine
}


def prepare(project: Path, *, console: bool) -> None:
    """Set Prefect's environment; without `console` its log lines go only to the server, not to the terminal."""
    proxies.check_supported()
    for name, value in QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)
    if not console:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    if not _writable(home):
        os.environ["PREFECT_HOME"] = str(project.resolve() / ".bessemer" / "prefect")
    url = running_server(project)
    if url:
        os.environ.setdefault("PREFECT_API_URL", url)


def note_server(project: Path, url: str) -> Path:
    """Store the address of `bessemer ui`, so that runs of this project report to it."""
    write_json(project / SERVER_NOTE, {"url": url})
    return project / SERVER_NOTE


def running_server(project: Path) -> str | None:
    """Return the address of the server that `bessemer ui` started, or None if it does not respond."""
    from http.client import HTTPException
    from urllib.request import urlopen

    note = read_json(project / SERVER_NOTE)
    url = note.get("url") if isinstance(note, dict) else None
    try:
        with urlopen(f"{url}/health", timeout=2) as answer:
            return url if answer.status == 200 else None
    except (OSError, HTTPException, ValueError):  # no server, another program, or no stored address
        return None


def connect() -> None:
    """Connect to Prefect's server, or start a temporary one if none is set; raise BessemerError if that fails.

    The temporary server is a child process in the terminal's foreground group, so Ctrl-C would end it before the run
    could report its final state, and Prefect would retry for a minute. It is therefore started from a thread that
    blocks SIGINT: child processes inherit the signal mask of the thread.
    """
    failures: list[BaseException] = []
    thread = threading.Thread(target=_connect, args=(failures,), daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise BessemerError(str(failures[0])) from failures[0]


def _connect(failures: list[BaseException]) -> None:
    from prefect.client.orchestration import get_client

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
            if problem:
                found = f"Prefect's server at {client.api_url} does not respond ({problem})"
                failures.append(RuntimeError(f"{found}. Start it (`bessemer ui` does), or unset PREFECT_API_URL."))
    except RuntimeError as error:
        failures.append(RuntimeError(f"Prefect's temporary server did not start: {error}"))


def _writable(folder: Path) -> bool:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return os.access(existing, os.W_OK)
