"""File locks between processes: the kernel releases a lock when its holder ends, even by `kill -9`."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockHeldError(Exception):
    """Another process holds the lock."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"process {holder} holds {path}")
        self.holder = holder  # the process id as text; the process may have ended since


@contextmanager
def lock_file(path: Path, *, wait: bool = False, remove: bool = False) -> Iterator[None]:
    """Hold an exclusive lock; the file contains the holder's process id.

    If another process holds it, wait (`wait`) or raise LockHeldError. `remove` deletes the file at the end. That is
    safe only if no process waits for the lock: it would lock the deleted file while a later one locks a new file.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise LockHeldError(path, file.read().strip()) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            if remove:
                path.unlink()
