"""Run a command on a leash: `python leash.py COMMAND [ARGUMENT ...]`.

The command and everything it starts are ended when this process is told to stop (SIGTERM, SIGINT), and also when
whoever started it is gone, however that came about: standard input is a pipe that nobody writes to, and it closes
with its other end. So a stage never outlives the run that it belongs to, not even one that was killed outright.
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

GRACE_S = 20.0  # under the 30 s after which a Prefect worker kills what it has asked to stop
WIND_UP_S = 3.0
PR_SET_CHILD_SUBREAPER = 36


class Told(BaseException):
    """The leash was pulled."""


def main() -> None:
    """Run the command and return its exit code, or end it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pull)
    adopt_orphans()
    threading.Thread(target=_watch_parent, daemon=True).start()
    pid, code = None, 128 + signal.SIGTERM
    try:
        process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
        pid = process.pid
        code = process.wait()
    except Told:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        end_children(pid)
    sys.exit(code if code >= 0 else 128 - code)


def adopt_orphans() -> None:
    """Have the kernel hand us the processes whose parents died, so that the whole tree stays in sight (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(command: int | None, grace_s: float = GRACE_S) -> None:
    """End every process beneath this one: SIGTERM first, SIGKILL to what is left after the grace.

    The command itself (DVC) is told last, and only if it does not end by itself: when it sees its stage end it gives
    its own locks back.
    """
    told: set[int] = set()
    began = alone = time.monotonic()
    while alive := _descendants():
        now = time.monotonic()
        below = [process for process in alive if process.pid != command]
        if below:
            alone = now
        if now - began > grace_s:
            _signal(alive, signal.SIGKILL)
        elif below or not told or now - alone > WIND_UP_S:
            _signal([process for process in below or alive if process.pid not in told], signal.SIGTERM)
            told.update(process.pid for process in below or alive)
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


def _pull(number: int, frame: FrameType | None) -> NoReturn:
    raise Told


def _watch_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
