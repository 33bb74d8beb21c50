"""Serve the package on a port of this machine: `make serve`, `bessemer serve`, or `python -m serving.serve [PORT]`."""

import errno
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from serving.errors import ServingError
from serving.intake import MODEL_HEADER
from serving.package import OTHERS, ROOT, VARIABLE, open_package

PORT = 3000
HOST = "127.0.0.1"  # there is no authentication: only this machine can ask, unless told otherwise
SERVICE = "serving.service:Bessemer"


def serve(port: int = PORT, host: str = HOST, others: Mapping[str, Path] | None = None) -> NoReturn:
    """Turn this process into BentoML's server, once port and package are seen to be there.

    `others`: further models by name, each a folder as `serving.package` describes it; by default those of the
    environment.
    """
    check_free(port, host)
    package = open_package()
    print(f"{package.tag} answers on http://{host}:{port}/ in a few seconds. Ctrl-C stops it.", flush=True)
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--working-dir", str(ROOT)]
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "True", VARIABLE: str(package.folder)}
    if others is not None:
        environment[OTHERS] = json.dumps({name: str(folder.resolve()) for name, folder in others.items()})
    os.execve(sys.executable, [*command, "--host", host, "--port", str(port)], environment)


def check_free(port: int, host: str) -> None:
    """Say why the endpoint cannot listen on a port, with one to take instead."""
    other = another(port, PORT)
    check_port(port, host, f"Choose another: `make serve PORT={other}` or `bessemer serve --port {other}`.")


def check_port(port: int, host: str, remedy: str) -> None:
    """Say why a port cannot be used and, in the words of `remedy`, how to choose another."""
    if not 0 < port < 2**16:
        raise ServingError(f"Port {port} does not exist: ports go from 1 to 65535. {remedy}")
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise ServingError(f"Port {port} is reserved for the system's own services. {remedy}") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServingError(f"Port {port} on {host} is taken by another program. {remedy}") from None
            raise ServingError(
                f"{host!r} is no address of this machine ({error.strerror}). Use `--host 127.0.0.1` to be reached from "
                "here alone, or `--host 0.0.0.0` to be reached from everywhere."
            ) from None


def running(port: int, host: str) -> list[str] | None:
    """Return the names of the models that an endpoint of ours on a port answers with; None where none answers."""
    from http.client import HTTPException
    from urllib.request import urlopen

    reached = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        with urlopen(f"http://{reached}:{port}/v1/models", timeout=2) as answer:
            ours = MODEL_HEADER in answer.headers
            return [str(entry["id"]) for entry in json.load(answer)["data"]] if ours else None
    except (OSError, HTTPException, ValueError, LookupError, TypeError):  # nobody, another program, or no models yet
        return None


def another(port: int, usual: int) -> int:
    """Return a port to advise instead of one that cannot be used: the one after the usual one, or the next."""
    return usual + 1 if port != usual + 1 else usual + 2


def main(arguments: list[str]) -> int:
    """Serve on the port that was given."""
    try:
        serve(int(arguments[0]) if arguments else PORT)
    except (ServingError, ValueError) as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
