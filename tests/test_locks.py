"""Locks between processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.common.locks import LockHeldError, lock_file
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from tasks.common.locks import lock_file

with lock_file(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    """Return a process that holds a lock."""
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_held_lock_names_its_holder_and_falls_to_the_next_when_the_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path, 60) as process:
        with pytest.raises(LockHeldError) as caught, lock_file(path):
            pass
        assert caught.value.holder == str(process.pid)
        process.kill()
    with lock_file(path):
        pass


def test_wait_returns_when_the_holder_ends(tmp_path: Path) -> None:
    with holder(tmp_path / "lock", 0.3) as process:
        with lock_file(tmp_path / "lock", wait=True):
            pass
        assert process.wait() == 0


def test_remove_deletes_the_file_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_file(tmp_path / "lock", remove=True):
        raise ZeroDivisionError
    assert not (tmp_path / "lock").exists()
