"""Which web pages of other sites may use the endpoint (CORS): none, unless `BESSEMER_ALLOWED_ORIGINS` names them."""

import os
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from serving.middleware import MODEL_HEADER

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ORIGINS_VARIABLE = "BESSEMER_ALLOWED_ORIGINS"  # separated by commas: https://chat.example.org, or * for every page


def allowed_origins() -> list[str]:
    """Return the origins whose pages may use the endpoint."""
    return [origin.strip().rstrip("/") for origin in os.environ.get(ORIGINS_VARIABLE, "").split(",") if origin.strip()]


class BrowserAccess:
    """ASGI middleware that answers preflight requests; the outermost one, because these have no body and no model."""

    def __init__(self, app: "ASGIApp") -> None:
        origins = allowed_origins()
        self.app = app
        self.answering = CORSMiddleware(
            app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=[MODEL_HEADER],
        ) if origins else None  # fmt: skip

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a preflight request, or pass a request on and add the headers that let a page read the answer."""
        if self.answering is not None:
            await self.answering(scope, receive, send)
        elif scope["type"] == "http" and _is_preflight(scope):
            await _refusal(scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _is_preflight(scope: "Scope") -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)


def _refusal(scope: "Scope") -> JSONResponse:
    origin = Headers(scope=scope).get("origin", "another site")
    message = f"Pages of {origin} may not use this endpoint: start it with `bessemer serve --allow-origin {origin}`."
    return JSONResponse({"error": message}, 403)
