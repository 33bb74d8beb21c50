"""OpenAI-compatible API: `POST /v1/chat/completions`, streamed or not, and `GET /v1/models`."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.decoding import Answer
from serving.errors import InputError
from serving.middleware import error_response, model_header, openai_error
from serving.package import choose
from serving.requests import ChatRequest, parse

if TYPE_CHECKING:
    from serving.package import Model


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    try:
        body = parse(ChatRequest, await request.body())
        chosen = choose(request.app.state.models, body.model)
        messages = [message.to_dict() for message in body.messages]
        answer = await run_in_threadpool(chosen.text.start, messages, body.sampling())
        if not body.stream:
            await answer.finish_async()
    except InputError as error:
        return error_response(_with_openai_names(error), request.url.path)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chosen.tag}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(answer, head, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=model_header(chosen.tag))
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    whole = {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}
    return JSONResponse(whole, headers=model_header(chosen.tag))


def _with_openai_names(error: InputError) -> InputError:
    """Return an error with the field names of OpenAI's API."""
    field = {"input": "messages", "max_new_tokens": "max_tokens"}.get(error.field, error.field)
    message = str(error).replace('"max_new_tokens"', '"max_tokens"')
    return InputError(message, field=field, code=error.code, status=error.status)


def _usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(answer: Answer, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Yield the server-sent events of one answer: role, pieces, finish reason and, if `usage`, the token counts."""
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for piece in answer:
            yield chunk({"content": piece})
    except InputError as error:  # from the engine, after the status line was sent
        yield _event({"error": openai_error(error)})
        return
    yield chunk({}, answer.finish_reason)
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
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/{rest:path}", unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
]
