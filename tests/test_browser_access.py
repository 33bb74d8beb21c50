"""Browser clients: preflight requests and the headers that let a page of another site read an answer."""

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serving.browser_access import ORIGINS_VARIABLE, BrowserAccess

ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type",
}  # fmt: skip


async def answer(_: Request) -> JSONResponse:
    return JSONResponse({"output": "Tokyo"}, headers={"X-Bessemer-Model": "tag"})


def client(monkeypatch: pytest.MonkeyPatch, origins: str) -> TestClient:
    monkeypatch.setenv(ORIGINS_VARIABLE, origins)
    app: Any = BrowserAccess(Starlette(routes=[Route("/generate", answer, methods=["POST"])]))
    return TestClient(app)


@pytest.mark.parametrize("origins", [ORIGIN, f"https://other.example.org, {ORIGIN}/", "*"])
def test_page_of_an_allowed_origin_may_use_the_endpoint(origins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = client(monkeypatch, origins)
    preflight = browser.options("/generate", headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] in (ORIGIN, "*")
    response = browser.post("/generate", headers={"Origin": ORIGIN}, json={})
    assert response.headers["access-control-allow-origin"] in (ORIGIN, "*")
    assert response.headers["access-control-expose-headers"] == "X-Bessemer-Model"


@pytest.mark.parametrize("origins", ["", "https://other.example.org"])
def test_page_of_another_origin_may_not(origins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = client(monkeypatch, origins)
    preflight = browser.options("/generate", headers=PREFLIGHT)
    assert preflight.status_code in (400, 403)
    assert "access-control-allow-origin" not in preflight.headers
    assert "access-control-allow-origin" not in browser.post("/generate", headers={"Origin": ORIGIN}, json={}).headers


def test_refusal_says_how_to_allow_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    error = client(monkeypatch, "").options("/generate", headers=PREFLIGHT).json()["error"]
    assert (
        error == f"Pages of {ORIGIN} may not use this endpoint: start it with `bessemer serve --allow-origin {ORIGIN}`."
    )
