"""OpenAI-compatible API: `POST /v1/chat/completions` and `/v1/completions`, streamed or not, and `GET /v1/models`."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.decoding import Answer
from serving.errors import InputError
from serving.middleware import error_response, model_header, openai_error
from serving.package import choose
from serving.requests import ChatRequest, CompletionRequest, parse

if TYPE_CHECKING:
    from serving.engine import Prompt
    from serving.package import Model


@dataclass(frozen=True)
class Form:
    """How one kind of completion is written: its names, and the part of a choice that holds text."""

    name: str
    chunk_name: str
    prefix: str  # of ids
    field: str  # of the request that holds the input
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]
    opening: dict[str, Any]
    closing: dict[str, Any]


CHAT = Form(
    "chat.completion", "chat.completion.chunk", "chatcmpl", "messages",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text}}, {"delta": {"role": "assistant", "content": ""}}, {"delta": {}},
)  # fmt: skip
TEXT = Form(
    "text_completion", "text_completion", "cmpl", "prompt", lambda text: {"text": text}, lambda text: {"text": text},
    {}, {"text": ""},
)  # fmt: skip


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _complete(request, ChatRequest, CHAT)


async def completions(request: Request) -> Response:
    """Continue a text."""
    return await _complete(request, CompletionRequest, TEXT)


async def _complete(request: Request, schema: type[ChatRequest] | type[CompletionRequest], form: Form) -> Response:
    try:
        body = parse(schema, await request.body())
        chosen = choose(request.app.state.models, body.model)
        answer = await run_in_threadpool(chosen.text.start, _prompt(body), body.sampling())
        if not body.stream:
            await answer.finish_async()
    except InputError as error:
        return error_response(_with_openai_names(error, form), request.url.path)
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": chosen.tag}
    if body.stream:
        events = _events(answer, head, form, usage=body.wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=model_header(chosen.tag))
    choice = {"index": 0, **form.whole(answer.text), "logprobs": None, "finish_reason": answer.finish_reason}
    whole = {**head, "object": form.name, "choices": [choice], "usage": _usage(answer)}
    return JSONResponse(whole, headers=model_header(chosen.tag))


def _prompt(body: ChatRequest | CompletionRequest) -> "Prompt":
    return body.prompt if isinstance(body, CompletionRequest) else [message.to_dict() for message in body.messages]


def _with_openai_names(error: InputError, form: Form) -> InputError:
    """Return an error with the field names of OpenAI's API."""
    field = {"input": form.field, "max_new_tokens": "max_tokens"}.get(error.field, error.field)
    message = str(error).replace('"max_new_tokens"', '"max_tokens"')
    return InputError(message, field=field, code=error.code, status=error.status)


def _usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(answer: Answer, head: dict[str, Any], form: Form, *, usage: bool) -> AsyncIterator[str]:
    """Yield the server-sent events of one answer: role, pieces, finish reason and, if `usage`, the token counts."""
    head = {**head, "object": form.chunk_name, **({"usage": None} if usage else {})}

    def chunk(part: dict[str, Any], finish: str | None = None) -> str:
        return _event({**head, "choices": [{"index": 0, **part, "logprobs": None, "finish_reason": finish}]})

    if form.opening:
        yield chunk(form.opening)
    try:
        async for piece in answer:
            yield chunk(form.piece(piece))
    except InputError as error:  # from the engine, after the status line was sent
        yield _event({"error": openai_error(error)})
        return
    yield chunk(form.closing, answer.finish_reason)
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def models(request: Request) -> Response:
    """List the chat models, each under its tag and under its stable name."""
    served: dict[str, Model] = request.app.state.models
    rows = [_model(name, entry) for entry in served.values() if entry.has_chat for name in (entry.tag, entry.name)]
    return JSONResponse({"object": "list", "data": rows})


async def model(request: Request) -> Response:
    """Describe one model."""
    name = request.path_params["name"]
    try:
        found = choose(request.app.state.models, name)
    except InputError as error:
        return error_response(error, request.url.path)
    return JSONResponse(_model(name, found), headers=model_header(found.tag))


def _model(name: str, model: "Model") -> dict[str, Any]:
    return {"id": name, "object": "model", "created": model.created, "owned_by": "bessemer"}


async def unknown(request: Request) -> Response:
    """Answer any other path under /v1 with status 404."""
    message = f"There is no {request.method} {request.url.path}; see /docs.json and the page at /api."
    return error_response(InputError(message, field="path", code="unknown_url", status=404), request.url.path)


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/{rest:path}", unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
]
