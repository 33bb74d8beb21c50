"""Loaded by every Python that has this folder on its path: refuses and writes down each connection to another machine.

`BESSEMER_CONNECTIONS` names the file that what was asked for is added to, one line each.
"""

import os
import socket
import sys
from ipaddress import ip_address
from typing import Any

EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}
_here = {"", "localhost", "0.0.0.0", "::", os.uname().nodename}


def _elsewhere(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    if name in _here:
        return False
    try:
        return not ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return True


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in EVENTS:
        return
    target = arguments[EVENTS[event]]
    if EVENTS[event]:
        if arguments[0].family == socket.AF_UNIX or not isinstance(target, tuple):
            return
        target = target[0]
    if _elsewhere(target):
        with open(os.environ["BESSEMER_CONNECTIONS"], "a", encoding="utf-8") as file:  # noqa: PTH123  needs no import
            file.write(f"{event} {target} by {' '.join(sys.orig_argv[:4])}\n")
        raise ConnectionRefusedError(f"{event} {target}: no test may leave this machine")


if "BESSEMER_CONNECTIONS" in os.environ:
    sys.addaudithook(_refuse)
