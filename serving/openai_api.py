"""OpenAI's chat API over what is served: `POST /v1/chat/completions`, streamed or not, and `GET /v1/models`."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.decoding import Answer
from serving.errors import InputError
from serving.intake import naming, refusal
from serving.package import choose
from serving.requests import ChatRequest, parse

if TYPE_CHECKING:
    from serving.package import Model


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    try:
        asked = parse(ChatRequest, await request.body())
        chosen = choose(request.app.state.models, asked.model)
        messages = [message.plain() for message in asked.messages]
        answer = await run_in_threadpool(chosen.text.start, messages, asked.sampling())
    except InputError as error:
        return refusal(_renamed(error), request.url.path)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chosen.tag}
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = _events(answer, head, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=naming(chosen.tag))
    await run_in_threadpool(answer.finish)
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    whole = {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}
    return JSONResponse(whole, headers=naming(chosen.tag))


def _renamed(error: InputError) -> InputError:
    """Name fields as OpenAI's request does."""
    field = {"input": "messages", "max_new_tokens": "max_tokens"}.get(error.field, error.field)
    message = str(error).replace('"max_new_tokens"', '"max_tokens"')
    return InputError(message, field=field, code=error.code, status=error.status)


def _usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _events(answer: Answer, head: dict[str, Any], usage: bool) -> Iterator[str]:
    """Yield the server-sent events of one answer: its role, its pieces, how it ended, and on request the counts."""
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})

    yield chunk({"role": "assistant", "content": ""})
    for piece in answer:
        yield chunk({"content": piece})
    yield chunk({}, answer.finish_reason)
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def models(request: Request) -> Response:
    """List what is served, each model under its tag and under a name that stays."""
    held: dict[str, Model] = request.app.state.models
    rows = [_model(name, entry) for entry in held.values() for name in (entry.tag, entry.name)]
    return JSONResponse({"object": "list", "data": rows})


async def model(request: Request) -> Response:
    """Describe one model."""
    name = request.path_params["name"]
    try:
        found = choose(request.app.state.models, name)
    except InputError as error:
        return refusal(error, request.url.path)
    return JSONResponse(_model(name, found), headers=naming(found.tag))


def _model(name: str, model: "Model") -> dict[str, Any]:
    return {"id": name, "object": "model", "created": model.created, "owned_by": "bessemer"}


async def unknown(request: Request) -> Response:
    """Answer any other address beneath /v1."""
    message = f"There is no {request.method} {request.url.path}; see /docs.json and the page at /api."
    return refusal(InputError(message, field="path", code="unknown_url", status=404), request.url.path)


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/{rest:path}", unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
]
