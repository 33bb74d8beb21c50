"""Proxy variables: this machine is never asked through a proxy, and a SOCKS proxy that cannot be used is named."""

import importlib.util
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest

from tasks.common import proxies
from tasks.common.settings import BessemerError
from tests.servers import free_port


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_loopback_is_added_to_the_exceptions_once(name: str) -> None:
    environment = {name: "http://10.0.0.1:3128", "NO_PROXY": "example.org,localhost"}
    for _ in range(2):
        proxies.exempt_loopback(environment)
    assert environment["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"
    assert environment["no_proxy"] == "127.0.0.1,localhost,::1"


def test_environment_without_a_proxy_is_not_changed() -> None:
    environment = {"NO_PROXY": "example.org"}
    proxies.exempt_loopback(environment)
    assert environment == {"NO_PROXY": "example.org"}


def test_loopback_is_reached_past_a_proxy_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    proxies.exempt_loopback()
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.handle_request, daemon=True).start()
        with urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=20) as answer:
            assert answer.status == 200


@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy"])
def test_socks_proxy_is_named_with_a_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BessemerError, match=rf"{name} is 'socks5://h:1', .* run `env -u {name} bessemer"):
        proxies.check_supported({name: "socks5://h:1"})
    proxies.check_supported({name: "http://h:1"})
