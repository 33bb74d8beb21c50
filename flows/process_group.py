"""Run a command and end all its processes with this one: `python process_group.py COMMAND [ARGUMENT ...]`.

The command and all its descendants are terminated when this process receives SIGTERM or SIGINT, and when its parent
ends for any reason. To detect that, the parent passes a pipe as standard input, which closes with the parent. So a
stage never outlives its run, even if the run was killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

import psutil

GRACE_PERIOD_S = 20.0  # less than the 30 s after which a Prefect worker kills a run that it cancels
COMMAND_EXIT_S = 3.0  # time for the command to exit by itself after its children
PR_SET_CHILD_SUBREAPER = 36


class TerminationRequested(BaseException):
    """A signal requested the termination of the command."""


def main() -> None:
    """Run the command and exit with its exit code; on a signal terminate it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_termination)
    adopt_orphans()
    threading.Thread(target=_watch_parent, daemon=True).start()
    pid, code = None, 128 + signal.SIGTERM
    try:
        process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
        pid = process.pid
        code = process.wait()
    except TerminationRequested:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        end_children(pid)
    sys.exit(code if code >= 0 else 128 - code)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that all of them can be found (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(command: int | None, grace_s: float = GRACE_PERIOD_S) -> None:
    """Terminate all descendants: SIGTERM first, SIGKILL after the grace period.

    The command itself (DVC) gets SIGTERM last, and only if it does not exit by itself: it releases its locks when its
    stage ends.
    """
    signalled: set[int] = set()
    started = command_alone_since = time.monotonic()
    while alive := _descendants():
        now = time.monotonic()
        below = [process for process in alive if process.pid != command]
        if below:
            command_alone_since = now
        if now - started > grace_s:
            _signal(alive, signal.SIGKILL)
        elif below or not signalled or now - command_alone_since > COMMAND_EXIT_S:
            _signal([process for process in below or alive if process.pid not in signalled], signal.SIGTERM)
            signalled.update(process.pid for process in below or alive)
        psutil.wait_procs(alive, timeout=0.1)


def _descendants() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if _alive(process)]


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _raise_termination(number: int, frame: FrameType | None) -> NoReturn:
    raise TerminationRequested


def _watch_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
