"""What every request passes on its way in and out: size and form are checked, and each answer names its model.

BentoML would check the same request models itself, but its errors are not sentences, and it logs each one with a
traceback, as if the service had failed. Here a bad request is answered before BentoML sees it.
"""

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
HEALTH = ("/livez", "/healthz", "/readyz", "/metrics")
MODEL_HEADER = "X-Bessemer-Model"


def refusal(error: InputError, path: str = "") -> JSONResponse:
    """Answer a request that cannot be met: in OpenAI's form beneath /v1, as one sentence elsewhere."""
    if not path.startswith("/v1/"):
        return JSONResponse({"error": str(error)}, error.status)
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    detail = {"message": str(error), "type": kind, "param": error.field, "code": error.code}
    return JSONResponse({"error": detail}, error.status)


def naming(tag: str) -> dict[str, str]:
    """Return the header that says which model an answer is of."""
    return {MODEL_HEADER: tag.encode("latin-1", "replace").decode("latin-1")}


class Intake:
    """ASGI middleware: `bodies` says what the body of a POST to a path must hold, `state` knows the models."""

    def __init__(self, app: "ASGIApp", bodies: "Mapping[str, type[BaseModel]]", state: "State") -> None:
        self.app = app
        self.bodies = bodies
        self.state = state

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Check a request, pass it on, and put the model's tag on the answer."""
        if scope["type"] != "http" or scope["path"] in HEALTH:
            await self.app(scope, receive, send)
        elif not self.state.models:
            error = InputError(self.state.problem, field="model", code="no_package", status=503)
            await refusal(error, scope["path"])(scope, receive, send)
        elif scope["method"] != "POST":
            await self.app(scope, receive, self._tagged(send, None))
        else:
            await self._post(scope, receive, send)

    async def _post(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        tagged = self._tagged(send, None)
        try:
            body = await _read(receive)
            if scope["path"] in self.bodies:
                asked = parse(self.bodies[scope["path"]], body)
                tagged = self._tagged(send, getattr(asked, "model", None))
        except InputError as error:
            await refusal(error, scope["path"])(scope, receive, tagged)
            return
        # `curl -d` calls its data a form unless told otherwise; here every body is JSON.
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
        await self.app(scope, _again(body, receive), tagged)

    def _tagged(self, send: "Send", name: str | None) -> "Send":
        """Return `send` with the tag of a model (None: the packaged one) on an answer that does not carry one yet."""
        added = [
            (key.lower().encode(), tag.encode()) for key, tag in naming(choose(self.state.models, name).tag).items()
        ]

        async def tagged(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                there = {key.lower() for key, _ in headers}
                message["headers"] = headers + [entry for entry in added if entry[0] not in there]
            await send(message)

        return tagged


async def _read(receive: "Receive") -> bytes:
    """Read a whole body, but not more than is sensible."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            limit = f"at most {MAX_BODY_BYTES:,} bytes are read"
            raise InputError(f"The request is too large: {limit}.", field="body", code="too_large", status=413)
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: "Receive") -> "Receive":
    """Hand a body that was read to whoever reads next; what comes after it (a disconnect) still comes."""
    pending = [body]

    async def replay() -> "Message":
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
