"""Prefect's surroundings for a run from the command line: quiet, and proof against Ctrl-C.

Nothing here overrides what a user has set. Import Prefect only after `prepare`: it reads its settings on import.
"""

import os
import signal
import threading
from pathlib import Path

from flows.records import read_json
from tasks.common.settings import BessemerError
from tasks.common.stage import write_json

SERVER_NOTE = Path(".bessemer/server.json")
QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",  # 20 by default; a busy small machine needs longer
}


def prepare(project: Path, *, console: bool) -> None:
    """Set Prefect's environment; without `console` its own log lines stay out of the terminal (the server has them)."""
    for name, value in QUIET.items():
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
    """Write down where `bessemer ui` serves, so that runs of this project show there."""
    write_json(project / SERVER_NOTE, {"url": url})
    return project / SERVER_NOTE


def running_server(project: Path) -> str | None:
    """Return the address of the server that `bessemer ui` started, where it still answers."""
    from http.client import HTTPException
    from urllib.request import urlopen

    note = read_json(project / SERVER_NOTE)
    url = note.get("url") if isinstance(note, dict) else None
    try:
        with urlopen(f"{url}/health", timeout=2) as answer:
            return url if answer.status == 200 else None
    except (OSError, HTTPException, ValueError):  # nobody answers there, or another program; no address
        return None


def connect() -> None:
    """Reach Prefect's server, starting its temporary one where none is set; raise a sentence where none answers.

    The temporary server is a child of ours and in the terminal's foreground, so Ctrl-C would end it before the run
    could tell it how it ended, and Prefect then tries for a minute. It therefore inherits a blocked SIGINT: signal
    masks belong to threads and go on to the processes that they start.
    """
    failure: list[BaseException] = []
    thread = threading.Thread(target=_connect, args=(failure,), daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise BessemerError(str(failure[0])) from failure[0]


def _connect(failure: list[BaseException]) -> None:
    from prefect.client.orchestration import get_client

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
            if problem:
                found = f"Prefect's server at {client.api_url} does not answer ({problem})"
                failure.append(RuntimeError(f"{found}. Start it (`bessemer ui` does), or unset PREFECT_API_URL."))
    except RuntimeError as error:
        failure.append(RuntimeError(f"Prefect's temporary server did not start: {error}"))


def _writable(folder: Path) -> bool:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return os.access(existing, os.W_OK)
