"""A `python` that runs stages in processes forked from one that has imported their libraries.

A stage of the smoke chain spends six of its seven seconds on imports, and DVC starts about fifty in the tests of the
whole chain. `python -m tests.forked_python SOCKET` imports the libraries and listens; a script asks it for a process
with the script's own folder, environment, arguments and output. It imports nothing of the project: stages run the code
of the folder that they are started in. Signals to the script do not reach the stage.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent  # not from conftest.py, which imports the project
MAX_REQUEST_BYTES = 2**17
ORPHAN_CHECK_S = 10.0  # the process ends this long after the tests, if they were killed
CLIENT = """#!{python} -IS
import json, os, socket, sys

module = sys.argv[2] if sys.argv[1:2] == ["-m"] else ""
try:
    os.unlink({fresh!r} + module)  # for a fresh interpreter; of two stages that start together, one gets it
    forked = False
except OSError:
    forked = module.startswith("tasks.")
if forked:
    request = {{"folder": os.getcwd(), "environment": {{**os.environ}}, "module": module}}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect({path!r})
        socket.send_fds(connection, [json.dumps(request | {{"arguments": sys.argv[3:]}}).encode()], [0, 1, 2])
        sys.exit(int(connection.recv(16) or 1))
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


@contextmanager
def serve() -> Iterator[Path]:
    """Start the process that stages are forked from; return the address of its socket."""
    # Not in pytest's folder: the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="bessemer-") as folder:
        address = Path(folder, "socket")
        with subprocess.Popen([sys.executable, "-m", __name__, str(address)], cwd=ROOT) as server:
            try:
                while not address.exists():
                    assert server.poll() is None, "the process that stages are forked from has ended"
                    time.sleep(0.05)
                yield address
            finally:
                server.kill()


@contextmanager
def first_in_path(address: Path, fresh: Iterable[str] = ()) -> Iterator[Path]:
    """Have `python` mean a script that has stages forked by the process at an address; return the script's path.

    Each of the modules `fresh` (`tasks.ingest`) is started in a fresh interpreter the first time. The script passes
    other commands to the interpreter of the tests.
    """
    with tempfile.TemporaryDirectory(prefix="bessemer-") as folder, pytest.MonkeyPatch.context() as patch:
        script, marks = Path(folder, "python"), Path(folder, "fresh")
        marks.mkdir()
        for module in fresh:
            (marks / module).touch()
        text = CLIENT.format(python=sys.executable, path=str(address), fresh=f"{marks}/")
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        yield script


def main(address: str) -> None:
    """Fork a process for every request, until the tests have ended."""
    import_libraries()
    gc.freeze()  # a collection in a fork would copy the pages of all these objects
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the handlers
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{address}.new")
    listener.listen()
    Path(f"{address}.new").rename(address)  # whoever sees the file can connect
    listener.settimeout(ORPHAN_CHECK_S)
    tests = os.getppid()
    while os.getppid() == tests:
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                handle(connection)
                os._exit(0)
            connection.close()


def handle(connection: socket.socket) -> None:
    """Run the stage in another fork and report its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
    process = os.fork()
    if process == 0:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        end(lambda: run_module(**json.loads(message)))
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    connection.send(str(code).encode())


def end(call: Callable[[], None]) -> NoReturn:
    """Make a call and end the process as an interpreter does, but do not free the objects: that takes seconds."""
    code: object = 1
    try:
        call()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    if not isinstance(code, int):
        print(code or "", file=sys.stderr)
        code = 0 if code is None else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_module(folder: str, environment: dict[str, str], module: str, arguments: list[str]) -> None:
    """Do what `python -m MODULE ARGUMENTS` does in a folder."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [module, *arguments]
    with suppress(ImportError):
        importlib.import_module("sitecustomize")  # as an interpreter does at its start: the guard of connections is one
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def import_libraries() -> None:
    """Import what stages spend their first seconds on."""
    modules: dict[str, Any] = sys.modules
    modules["openvino_telemetry"] = None  # as `serving.folders.import_openvino` does
    os.environ |= {"DS_ACCELERATOR": "cpu", "GX_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    import datasets  # noqa: F401
    import great_expectations  # noqa: F401
    import networkx  # noqa: F401
    import nncf  # noqa: F401
    import openvino_genai  # noqa: F401
    import optimum.intel.openvino.quantization  # noqa: F401
    import phonenumbers  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.modernbert.modeling_modernbert  # noqa: F401


if __name__ == "__main__":
    main(sys.argv[1])
