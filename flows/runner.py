"""Run a DVC stage in its own process group, follow its output, and end all its processes with the run.

A stage's output becomes log lines; the percentages of its progress bars (` 42%|`) become progress.
"""

import codecs
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from flows import process_group
from flows.environment import QUIET_VARIABLES
from tasks.common.harness.records import RUN_ID_VARIABLE
from tasks.common.settings import BessemerError

PROGRESS_BAR = re.compile(r"^\s*(?P<what>[^|]*?):?\s*(?P<percent>\d{1,3})%\|[^|]*\|?\s*(?P<rest>.*)$")
DVC_CHATTER = re.compile(  # DVC's own messages
    r"Running stage '|> |(Updating|Generating) lock file '|To track the changes with git|\tgit add "
    r"|To enable auto staging|\tdvc config core.autostage|Use `dvc push`|Stage '.*' (is cached|didn't change)"
)
FAILED_COMMAND = re.compile(r"ERROR: failed to reproduce '.*': failed to run: ")
MAX_ERROR_LINES = 15


class StageFailed(BessemerError):
    """A stage failed; the text is the end of its output."""


class StageStopped(BessemerError):
    """A stage was terminated, or not started, because its run is being stopped."""


class Runner:
    """Runs the stages of one run in one folder; `stop` terminates the running ones and prevents further ones."""

    def __init__(self, project: Path, run_id: str) -> None:
        self.project, self.run_id = project, run_id
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, name: str, line: Callable[[str], None], progress: Callable[[float, str], None]) -> None:
        """Run one stage; raise StageFailed with the end of its output, or StageStopped."""
        process = self._start(name)
        assert process.stdout is not None
        recent_lines: deque[str] = deque(maxlen=400)
        try:
            for text in split_lines(process.stdout):
                if bar := PROGRESS_BAR.match(text):
                    progress(min(float(bar["percent"]), 100.0), " ".join((bar["what"], bar["rest"])).strip())
                elif text.strip() and not DVC_CHATTER.match(text):
                    recent_lines.append(text)
                    line(text)
            code = process.wait()
        finally:
            self._terminate(process)
            process.stdout.close()
        if self._stopped:
            raise StageStopped(
                f"{name} was stopped; the next run repeats it from the start or from its last checkpoint."
            )
        if code != 0:
            raise StageFailed(
                error_message(name, list(recent_lines)) or f"{name} ended with exit code {code} and without output."
            )

    def stop(self) -> None:
        """Terminate all running stages and wait for their end."""
        with self._lock:
            self._stopped = True
            live = list(self._live)
        for process in live:
            process.send_signal(signal.SIGTERM)
        for process in live:
            self._terminate(process)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        stage = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
        with self._lock:
            if self._stopped:
                raise StageStopped(f"{name} was not started.")
            process = subprocess.Popen(
                [sys.executable, process_group.__file__, *stage],
                cwd=self.project,
                env=stage_environment(self.run_id),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops its stages
            )
            self._live.add(process)
        return process

    def _terminate(self, process: subprocess.Popen[bytes]) -> None:
        """Close the stage's standard input, on which its process group ends, and wait, at most for its grace period."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=process_group.GRACE_PERIOD_S + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with self._lock:
            self._live.discard(process)


def stage_environment(run_id: str) -> dict[str, str]:
    """Return a stage's environment: this Python first on PATH, telemetry disabled, and the run id."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return {
        **os.environ,
        **QUIET_VARIABLES,
        "PATH": path,
        "PYTHONUNBUFFERED": "1",
        "TQDM_MININTERVAL": "1",
        RUN_ID_VARIABLE: run_id,
    }


def split_lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield the lines of a stream as they arrive, split at line feeds and carriage returns (progress bars)."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    rest = ""
    while data := os.read(stream.fileno(), 65536):
        *lines, rest = re.split(r"\r\n|\r|\n", rest + decode(data))
        yield from lines
    if rest:
        yield rest


def error_message(name: str, lines: list[str]) -> str:
    """Return a failed stage's error message (from the line `name: ...` on), or else its last MAX_ERROR_LINES lines."""
    stage_lines = [line for line in lines if not FAILED_COMMAND.match(line)]
    for index in range(len(stage_lines) - 1, -1, -1):
        if stage_lines[index].startswith(f"{name}: "):
            return "\n".join(stage_lines[index:])
    return "\n".join(stage_lines[-MAX_ERROR_LINES:])
