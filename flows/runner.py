"""Run one DVC stage in a process tree of its own, follow what it prints, and never leave it behind.

What a stage prints becomes log lines; the percentages of its progress bars (` 42%|`) become progress.
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

from flows import leash
from tasks.common.settings import BessemerError
from tasks.common.stage import RUN_ID

BAR = re.compile(r"^\s*(?P<what>[^|]*?):?\s*(?P<percent>\d{1,3})%\|[^|]*\|?\s*(?P<rest>.*)$")
CHATTER = re.compile(  # what DVC says beside the stage itself
    r"Running stage '|> |(Updating|Generating) lock file '|To track the changes with git|\tgit add "
    r"|To enable auto staging|\tdvc config core.autostage|Use `dvc push`|Stage '.*' (is cached|didn't change)"
)
FAILED_COMMAND = re.compile(r"ERROR: failed to reproduce '.*': failed to run: ")
LAST_LINES = 15


class StageFailed(BessemerError):
    """A stage ended badly; the text is what it said last."""


class StageStopped(BessemerError):
    """A stage was ended, or not started, because its run is being stopped."""


class Runner:
    """Runs the stages of one run in one folder; `stop` ends those under way and lets no further one start."""

    def __init__(self, project: Path, run_id: str) -> None:
        self.project, self.run_id = project, run_id
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, name: str, line: Callable[[str], None], progress: Callable[[float, str], None]) -> None:
        """Run one stage to its end; raise StageFailed with its last lines, or StageStopped."""
        process = self._start(name)
        assert process.stdout is not None
        last: deque[str] = deque(maxlen=400)
        try:
            for text in split_lines(process.stdout):
                if bar := BAR.match(text):
                    progress(min(float(bar["percent"]), 100.0), " ".join((bar["what"], bar["rest"])).strip())
                elif text.strip() and not CHATTER.match(text):
                    last.append(text)
                    line(text)
            code = process.wait()
        finally:
            self._end(process)
            process.stdout.close()
        if self._stopped:
            raise StageStopped(f"{name} was stopped; the next run does it again from its beginning or last checkpoint.")
        if code != 0:
            raise StageFailed(last_words(name, list(last)) or f"{name} ended with exit code {code} and said nothing.")

    def stop(self) -> None:
        """End everything that is under way, and wait until it is gone."""
        with self._lock:
            self._stopped = True
            live = list(self._live)
        for process in live:
            process.send_signal(signal.SIGTERM)
        for process in live:
            self._end(process)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        stage = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
        with self._lock:
            if self._stopped:
                raise StageStopped(f"{name} was not started.")
            process = subprocess.Popen(
                [sys.executable, leash.__file__, *stage],
                cwd=self.project,
                env=environment(self.run_id),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends its stages in order
            )
            self._live.add(process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Let go of the leash and wait: the other end needs its grace at most."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=leash.GRACE_S + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with self._lock:
            self._live.discard(process)


def environment(run_id: str) -> dict[str, str]:
    """Return the variables that a stage gets: this Python first on its path, and no questions asked of the network."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    quiet = {"DVC_NO_ANALYTICS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    return {**os.environ, **quiet, "PATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "1", RUN_ID: run_id}


def split_lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield what comes as it comes, split where a line ends or a progress bar returns to its start."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    rest = ""
    while data := os.read(stream.fileno(), 65536):
        *lines, rest = re.split(r"\r\n|\r|\n", rest + decode(data))
        yield from lines
    if rest:
        yield rest


def last_words(name: str, lines: list[str]) -> str:
    """Return what a failed stage said: its own sentence where it gave one, else the end of what it printed."""
    own = [line for line in lines if not FAILED_COMMAND.match(line)]
    for index in range(len(own) - 1, -1, -1):
        if own[index].startswith(f"{name}: "):
            return "\n".join(own[index:])
    return "\n".join(own[-LAST_LINES:])
