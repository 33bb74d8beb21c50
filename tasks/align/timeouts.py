"""A time limit for calls that cannot be interrupted: a user's function, another process's answer."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call_with_timeout(call: Callable[[], Result], seconds: float) -> Result:
    """Return a call's result or raise its error; raise TimeoutError if it takes longer than `seconds`.

    The call runs in its own thread. Python cannot end a thread: one that hangs is abandoned. It is a daemon thread, so
    the process can still exit.
    """
    answers: queue.SimpleQueue[tuple[list[Result], Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(([call()], None))
        except Exception as error:  # raised in the caller's thread below
            answers.put(([], error))

    threading.Thread(target=work, daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"it has not answered within {seconds:g} s") from None
    if error:
        raise error
    return found[0]
