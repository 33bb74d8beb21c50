"""Proxy variables of the environment (`HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`).

This machine is never asked through a proxy: a company's proxy would look for the endpoint or Prefect's server on
itself, after a minute's wait.
"""

import importlib.util
import os
from collections.abc import MutableMapping

from tasks.common.settings import BessemerError

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def exempt_loopback(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add this machine to `NO_PROXY` in both spellings if a proxy is set; child processes inherit it."""
    if not any(environment.get(name) or environment.get(name.lower()) for name in PROXY_VARIABLES):
        return
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in environment.get(name, "").split(",") if host.strip()]
        environment[name] = ",".join([*hosts, *(host for host in LOOPBACK_HOSTS if host not in hosts)])


def check_supported(environment: MutableMapping[str, str] = os.environ) -> None:
    """Raise BessemerError if a proxy is a SOCKS proxy and the HTTP client of Prefect cannot use one."""
    if importlib.util.find_spec("socksio"):
        return
    for name in (variable for upper in PROXY_VARIABLES for variable in (upper, upper.lower())):
        if environment.get(name, "").lower().startswith("socks"):
            raise BessemerError(
                f"{name} is {environment[name]!r}, a SOCKS proxy, which needs the package socksio: run "
                f"`env -u {name} bessemer ...`, or pip install socksio."
            )
