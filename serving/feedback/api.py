"""The HTTP routes of the web pages: chat answers, samples to rank, and people's rankings, thumbs, flags and skips.

Requests are small JSON bodies. A request that changes the store carries an id that the page made. The reply is sent
after the commit, and the page repeats a request without a reply under the same id. Cross-site posts get status 403.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.decoding import MAX_TEMPERATURE, Answer, Sampling
from serving.errors import InputError
from serving.feedback.judgements import MAX_ANSWERS, MIN_ANSWERS, FeedbackError
from serving.middleware import error_response, model_header
from serving.package import choose
from serving.requests import Body, ChatMessage, Text, parse
from serving.samples import SEED_LIMIT, sample_answers

if TYPE_CHECKING:
    from serving.feedback.store import Store
    from serving.package import Model

# Threads for blocking disk writes. They are separate so that a ranking never waits for generation.
WRITER_THREADS = ThreadPoolExecutor(8, "feedback")

Result = TypeVar("Result")


class AnswerRequest(Body):
    """A conversation to answer as a stream."""

    messages: list[ChatMessage]
    model: str | None = None
    temperature: float = 0.0
    seed: int | None = Field(None, ge=0, lt=SEED_LIMIT)


class SampleRequest(Body):
    """A request for answers to rank: to `question`, or to the next waiting question if it is None."""

    annotator: str
    question: Text | None = None
    count: int = Field(4, ge=MIN_ANSWERS, le=MAX_ANSWERS)
    temperature: float = Field(0.8, ge=0, le=MAX_TEMPERATURE)
    models: list[str] | None = None


class RankingRequest(Body):
    """A ranking: the answers' ids in the order shown, and the rank of each."""

    id: str
    answers: list[str]
    ranks: list[int]
    annotator: str


class WithdrawRequest(Body):
    """A ranking that its annotator withdraws."""

    id: str
    annotator: str


class OpinionRequest(Body):
    """A thumb or a flag on one answer."""

    id: str
    answer: str
    opinion: str
    annotator: str
    note: str = ""


class SkipRequest(Body):
    """A question that this annotator skips."""

    prompt: list[ChatMessage]
    annotator: str


Handler = Callable[[Request], Awaitable[Response]]


def handle_errors(handler: Handler) -> Handler:
    """Turn a handler's errors into JSON error replies, and reject cross-site posts with status 403."""

    async def wrapper(request: Request) -> Response:
        try:
            if _is_cross_site(request):
                raise InputError("Only this endpoint's own pages may post here.", code="foreign_page", status=403)
            return await handler(request)
        except InputError as error:
            return error_response(error)
        except FeedbackError as error:
            return JSONResponse({"error": str(error)}, 503)

    return wrapper


def _is_cross_site(request: Request) -> bool:
    """Return whether a post is cross-site, by `Sec-Fetch-Site` or, where the browser sends none, by `Origin`."""
    fetch_site = request.headers.get("sec-fetch-site")
    if fetch_site is not None:
        return fetch_site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def require_store(request: Request) -> "Store":
    """Return the store; raise FeedbackError if it could not be opened."""
    store: Store | None = request.app.state.store
    if store is None:
        raise FeedbackError(request.app.state.store_problem)
    return store


async def run_blocking(work: Callable[..., Result], *arguments: Any) -> Result:
    """Run a blocking store call in a writer thread."""
    return await asyncio.get_running_loop().run_in_executor(WRITER_THREADS, partial(work, *arguments))


@handle_errors
async def answers(request: Request) -> Response:
    """Answer a conversation as server-sent events: pieces of text, then the answer's id and model."""
    body = parse(AnswerRequest, await request.body())
    model = choose(request.app.state.models, body.model)
    messages = [message.to_dict() for message in body.messages]
    sampling = Sampling(temperature=body.temperature, seed=body.seed)
    answer = await run_in_threadpool(model.text.start, messages, sampling)

    def save_answer() -> str:
        rows = [(answer.text, model.tag, body.temperature, body.seed)]
        return require_store(request).add_answers(messages, rows)[0]

    return StreamingResponse(
        _events(answer, model, save_answer), media_type="text/event-stream", headers=model_header(model.tag)
    )


async def _events(answer: Answer, model: "Model", save_answer: Callable[[], str]) -> AsyncIterator[str]:
    """Yield the events of one answer. Its id is None if it could not be stored; it cannot be rated then."""
    async for piece in answer:
        yield _event({"text": piece})
    try:
        identifier, problem = await run_blocking(save_answer) if answer.text.strip() else None, None
    except FeedbackError as error:
        identifier, problem = None, str(error)
    end = {"id": identifier, "name": model.name, "model": model.tag, "finish_reason": answer.finish_reason}
    yield _event({**end, "problem": problem})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


@handle_errors
async def samples(request: Request) -> Response:
    """Sample answers to rank and report how many questions are waiting. The reply does not name the models.

    An error reply contains the question as well, so that the page can skip it.
    """
    store, questions = require_store(request), request.app.state.questions
    body = parse(SampleRequest, await request.body())
    served = request.app.state.models
    names = body.models or [name for name, model in served.items() if model.has_chat] or served
    models = [choose(served, name) for name in dict.fromkeys(names)]
    await run_blocking(questions.refresh)
    if body.question is None:
        prompt = await run_blocking(questions.next, body.annotator)
    else:
        prompt = [{"role": "user", "content": body.question.strip()}]
    reply = {"prompt": prompt, "answers": [], **await run_blocking(questions.progress)}
    if prompt is None:
        return JSONResponse(reply)
    try:
        sampled = await run_in_threadpool(sample_answers, models, prompt, body.count, body.temperature)
    except InputError as error:
        return JSONResponse({"error": str(error), "prompt": prompt}, error.status)
    ids = await run_blocking(store.add_answers, prompt, sampled)
    listed = [{"id": identifier, "text": sample.text} for identifier, sample in zip(ids, sampled, strict=True)]
    return JSONResponse({**reply, "answers": listed})


@handle_errors
async def rankings(request: Request) -> Response:
    """Store a ranking."""
    body = parse(RankingRequest, await request.body())
    ranking = await run_blocking(require_store(request).add_ranking, body.id, body.answers, body.ranks, body.annotator)
    return JSONResponse({"saved": asdict(ranking)})


@handle_errors
async def withdrawals(request: Request) -> Response:
    """Withdraw a ranking."""
    body = parse(WithdrawRequest, await request.body())
    ranking = await run_blocking(require_store(request).withdraw, body.id, body.annotator)
    return JSONResponse({"withdrawn": ranking.id})


@handle_errors
async def opinions(request: Request) -> Response:
    """Store a thumb or a flag."""
    body = parse(OpinionRequest, await request.body())
    opinion = await run_blocking(
        require_store(request).add_opinion, body.id, body.answer, body.opinion, body.annotator, body.note
    )
    return JSONResponse({"saved": opinion.id})


@handle_errors
async def skips(request: Request) -> Response:
    """Do not offer a question to this annotator again."""
    body = parse(SkipRequest, await request.body())
    prompt = [message.to_dict() for message in body.prompt]
    require_store(request)
    await run_blocking(request.app.state.questions.skip, prompt, body.annotator)
    return JSONResponse({"skipped": True})


ROUTES = [
    Route(f"/feedback/{name}", handler, methods=["POST"])
    for name, handler in {
        "answers": answers, "samples": samples, "rankings": rankings, "withdrawals": withdrawals,
        "opinions": opinions, "skips": skips,
    }.items()
]  # fmt: skip
