"""Serve the package on a local port: `make serve`, `bessemer serve`, or `python -m serving.serve [PORT]`."""

import errno
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from serving.browser_access import ORIGINS_VARIABLE
from serving.errors import ServingError
from serving.middleware import MODEL_HEADER
from serving.package import MODELS_VARIABLE, PACKAGE_VARIABLE, ROOT, open_package

PORT = 3000
HOST = "127.0.0.1"  # there is no authentication, so only this machine can connect by default
SERVICE = "serving.service:Bessemer"


def serve(
    port: int = PORT, host: str = HOST, others: Mapping[str, Path] | None = None, origins: Sequence[str] = ()
) -> NoReturn:
    """Replace this process by BentoML's server, after checking the port and the package.

    `others`: further models, name to folder (see `serving.package`); by default those of `BESSEMER_MODELS`. `origins`:
    sites whose pages may use the endpoint; by default those of `BESSEMER_ALLOWED_ORIGINS`.
    """
    check_free(port, host)
    package = open_package()
    print(f"{package.tag} answers on http://{host}:{port}/ in a few seconds. Ctrl-C stops it.", flush=True)
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--working-dir", str(ROOT)]
    environment = {
        **os.environ,
        "BENTOML_DO_NOT_TRACK": "True",
        "DO_NOT_TRACK": "1",
        PACKAGE_VARIABLE: str(package.folder),
    }
    if others is not None:
        environment[MODELS_VARIABLE] = json.dumps({name: str(folder.resolve()) for name, folder in others.items()})
    if origins:
        environment[ORIGINS_VARIABLE] = ",".join(origins)
    os.execve(sys.executable, [*command, "--host", host, "--port", str(port)], environment)


def check_free(port: int, host: str) -> None:
    """Raise ServingError if the endpoint cannot listen on a port; the message suggests another."""
    other = alternative_port(port, PORT)
    check_port(port, host, f"Choose another: `make serve PORT={other}` or `bessemer serve --port {other}`.")


def check_port(port: int, host: str, remedy: str) -> None:
    """Raise ServingError if a port cannot be used; `remedy` ends the message and says how to choose another."""
    if not 0 < port < 2**16:
        raise ServingError(f"Port {port} does not exist: ports go from 1 to 65535. {remedy}")
    with socket.socket() as probe:
        # As servers do, so that a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise ServingError(f"Port {port} is reserved for the system's own services. {remedy}") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServingError(f"Port {port} on {host} is taken by another program. {remedy}") from None
            raise ServingError(
                f"{host!r} is not an address of this machine ({error.strerror}). Use `--host 127.0.0.1` for local "
                "connections only, or `--host 0.0.0.0` for connections from everywhere."
            ) from None


def served_models(port: int, host: str) -> list[str] | None:
    """Return the model names of a Bessemer endpoint on a port, or None if none answers."""
    from http.client import HTTPException
    from urllib.request import urlopen

    address = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        with urlopen(f"http://{address}:{port}/v1/models", timeout=2) as answer:
            is_bessemer = MODEL_HEADER in answer.headers
            return [str(entry["id"]) for entry in json.load(answer)["data"]] if is_bessemer else None
    except (OSError, HTTPException, ValueError, LookupError, TypeError):  # no server, another program, or no models yet
        return None


def alternative_port(port: int, usual: int) -> int:
    """Return a port to suggest instead of `port`: `usual` + 1, or + 2 if `port` is that one."""
    return usual + 1 if port != usual + 1 else usual + 2


def main(arguments: list[str]) -> int:
    """Serve on the port in `arguments`, by default PORT."""
    try:
        serve(int(arguments[0]) if arguments else PORT)
    except (ServingError, ValueError) as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
