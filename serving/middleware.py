"""Request middleware: checks body size and schema, and adds the model header to every response.

BentoML validates the same request models, but its error messages are hard to read and it logs each one with a
traceback. Here an invalid request is answered before BentoML sees it.
"""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from serving.errors import InputError
from serving.package import choose
from serving.requests import parse

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.datastructures import State
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2**20
HEALTH_PATHS = ("/livez", "/healthz", "/readyz", "/metrics")
MODEL_HEADER = "X-Bessemer-Model"


def error_response(error: InputError, path: str = "") -> JSONResponse:
    """Return the response to a failed request: an OpenAI error object under /v1, a one-sentence `error` elsewhere."""
    if not path.startswith("/v1/"):
        return JSONResponse({"error": str(error)}, error.status)
    return JSONResponse({"error": openai_error(error)}, error.status)


def openai_error(error: InputError) -> dict[str, str]:
    """Return an error as OpenAI's error object."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"message": str(error), "type": kind, "param": error.field, "code": error.code}


def model_header(tag: str) -> dict[str, str]:
    """Return the response header that carries the model's tag."""
    return {MODEL_HEADER: tag.encode("latin-1", "replace").decode("latin-1")}


class RequestMiddleware:
    """ASGI middleware. `bodies` maps a POST path to its request model; `state.models` holds the served models."""

    def __init__(self, app: "ASGIApp", bodies: "Mapping[str, type[BaseModel]]", state: "State") -> None:
        self.app = app
        self.bodies = bodies
        self.state = state

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Validate a request, pass it on, and add the model header to the response."""
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self.app(scope, receive, send)
        elif not self.state.models:
            error = InputError(self.state.problem, field="model", code="no_package", status=503)
            await error_response(error, scope["path"])(scope, receive, send)
        elif scope["method"] != "POST":
            await self.app(scope, receive, self._add_model_header(send, None))
        else:
            await self._post(scope, receive, send)

    async def _post(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        tagged_send = self._add_model_header(send, None)
        try:
            body = await _read_body(receive)
            if scope["path"] in self.bodies:
                parsed = parse(self.bodies[scope["path"]], body)
                tagged_send = self._add_model_header(send, getattr(parsed, "model", None))
        except InputError as error:
            await error_response(error, scope["path"])(scope, receive, tagged_send)
            return
        # `curl -d` sends a form content type by default; here every body is JSON.
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
        await _run_until_disconnect(self.app, scope, body, receive, tagged_send)

    def _add_model_header(self, send: "Send", name: str | None) -> "Send":
        """Return a `send` that adds a model's header (None: the packaged model) unless the response has one."""
        added = [
            (key.lower().encode(), tag.encode())
            for key, tag in model_header(choose(self.state.models, name).tag).items()
        ]

        async def send_with_header(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                present = {key.lower() for key, _ in headers}
                message["headers"] = headers + [entry for entry in added if entry[0] not in present]
            await send(message)

        return send_with_header


async def _read_body(receive: "Receive") -> bytes:
    """Read a whole body; raise InputError above MAX_BODY_BYTES."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            limit = f"at most {MAX_BODY_BYTES:,} bytes are read"
            raise InputError(f"The request is too large: {limit}.", field="body", code="too_large", status=413)
        if not message.get("more_body", False):
            return bytes(body)


async def _run_until_disconnect(app: "ASGIApp", scope: "Scope", body: bytes, receive: "Receive", send: "Send") -> None:
    """Run the application on a body that was read; cancel it when the client disconnects."""
    pending, disconnected = [body], asyncio.Event()

    async def replay() -> "Message":
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        disconnected.set()

    app_task, watch_task = asyncio.ensure_future(app(scope, replay, send)), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((app_task, watch_task), return_when=asyncio.FIRST_COMPLETED)
        if app_task.done():
            await app_task
    finally:
        watch_task.cancel()
        app_task.cancel()
        await asyncio.gather(app_task, watch_task, return_exceptions=True)
