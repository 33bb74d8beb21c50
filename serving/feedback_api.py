"""The routes behind the pages: answers to talk to and to rank, and people's rankings, thumbs, flags and skips.

Posts are small JSON bodies. What changes the store carries an id that the page made, and is answered only once it is
on disk; the page sends it again under the same id where no answer came. Other websites' pages cannot post here.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
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
from serving.intake import naming, refusal
from serving.judgements import FEWEST, MOST, FeedbackError
from serving.package import choose
from serving.requests import Body, ChatMessage, Text, parse
from serving.samples import SEEDS, draw

if TYPE_CHECKING:
    from serving.feedback import Store
    from serving.package import Model

# Threads that wait for the disk: of their own, so that a ranking never waits for answers to be drawn.
WRITERS = ThreadPoolExecutor(8, "feedback")

Result = TypeVar("Result")


class AnswerRequest(Body):
    """A conversation to be answered piece by piece."""

    messages: list[ChatMessage]
    model: str | None = None
    temperature: float = 0.0
    seed: int | None = Field(None, ge=0, lt=SEEDS)


class SampleRequest(Body):
    """Answers to rank: to the question given here, or to the next one that waits."""

    annotator: str
    question: Text | None = None
    count: int = Field(4, ge=FEWEST, le=MOST)
    temperature: float = Field(0.8, ge=0, le=MAX_TEMPERATURE)
    models: list[str] | None = None


class RankingRequest(Body):
    """A ranking: the answers' ids as they were shown, and the rank of each."""

    id: str
    answers: list[str]
    ranks: list[int]
    annotator: str


class WithdrawRequest(Body):
    """A ranking that its maker takes back."""

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
    """A question that this annotator would not rank."""

    prompt: list[ChatMessage]
    annotator: str


Handler = Callable[[Request], Awaitable[Response]]


def told(handler: Handler) -> Handler:
    """Answer what cannot be met with one sentence, and posts that come from another site's page not at all."""

    async def answer(request: Request) -> Response:
        try:
            if _foreign(request):
                raise InputError("Only this endpoint's own pages may post here.", code="foreign_page", status=403)
            return await handler(request)
        except InputError as error:
            return refusal(error)
        except FeedbackError as error:
            return JSONResponse({"error": str(error)}, 503)

    return answer


def _foreign(request: Request) -> bool:
    """Whether a post comes from another site's page: its browser says so, or, over plain HTTP, the page's address."""
    said = request.headers.get("sec-fetch-site")
    if said is not None:
        return said not in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def opened(request: Request) -> "Store":
    """Return the store, or say why there is none."""
    store: Store | None = request.app.state.store
    if store is None:
        raise FeedbackError(request.app.state.store_problem)
    return store


async def written(work: Callable[..., Result], *arguments: Any) -> Result:
    """Run what waits for the disk."""
    return await asyncio.get_running_loop().run_in_executor(WRITERS, partial(work, *arguments))


@told
async def answers(request: Request) -> Response:
    """Answer a conversation as server-sent events: pieces of text, at the end the answer's id and model."""
    asked = parse(AnswerRequest, await request.body())
    model = choose(request.app.state.models, asked.model)
    messages = [message.plain() for message in asked.messages]
    sampling = Sampling(temperature=asked.temperature, seed=asked.seed)
    answer = await run_in_threadpool(model.text.start, messages, sampling)

    def keep() -> str:
        given = [(answer.text, model.tag, asked.temperature, asked.seed)]
        return opened(request).add_answers(messages, given)[0]

    return StreamingResponse(_events(answer, model, keep), media_type="text/event-stream", headers=naming(model.tag))


def _events(answer: Answer, model: "Model", keep: Callable[[], str]) -> Iterator[str]:
    """Yield the events of one answer. Its id is None where it cannot be kept, and so not be judged."""
    for piece in answer:
        yield _event({"text": piece})
    try:
        identifier, problem = keep() if answer.text.strip() else None, None
    except FeedbackError as error:
        identifier, problem = None, str(error)
    end = {"id": identifier, "name": model.name, "model": model.tag, "finish_reason": answer.finish_reason}
    yield _event({**end, "problem": problem})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


@told
async def samples(request: Request) -> Response:
    """Draw answers to rank, and tell how many questions wait. Which model gave which is not told.

    A refusal names the question too, so that it can be skipped.
    """
    store, questions = opened(request), request.app.state.questions
    asked = parse(SampleRequest, await request.body())
    served = request.app.state.models
    models = [choose(served, name) for name in dict.fromkeys(asked.models or served)]
    await written(questions.refresh)
    if asked.question is None:
        prompt = await written(questions.next, asked.annotator)
    else:
        prompt = [{"role": "user", "content": asked.question.strip()}]
    reply = {"prompt": prompt, "answers": [], **await written(questions.progress)}
    if prompt is None:
        return JSONResponse(reply)
    try:
        drawn = await run_in_threadpool(draw, models, prompt, asked.count, asked.temperature)
    except InputError as error:
        return JSONResponse({"error": str(error), "prompt": prompt}, error.status)
    ids = await written(store.add_answers, prompt, drawn)
    shown = [{"id": identifier, "text": sample.text} for identifier, sample in zip(ids, drawn, strict=True)]
    return JSONResponse({**reply, "answers": shown})


@told
async def rankings(request: Request) -> Response:
    """Keep a ranking."""
    asked = parse(RankingRequest, await request.body())
    kept = await written(opened(request).add_ranking, asked.id, asked.answers, asked.ranks, asked.annotator)
    return JSONResponse({"saved": asdict(kept)})


@told
async def withdrawals(request: Request) -> Response:
    """Take a ranking back."""
    asked = parse(WithdrawRequest, await request.body())
    kept = await written(opened(request).withdraw, asked.id, asked.annotator)
    return JSONResponse({"withdrawn": kept.id})


@told
async def opinions(request: Request) -> Response:
    """Keep a thumb or a flag."""
    asked = parse(OpinionRequest, await request.body())
    kept = await written(
        opened(request).add_opinion, asked.id, asked.answer, asked.opinion, asked.annotator, asked.note
    )
    return JSONResponse({"saved": kept.id})


@told
async def skips(request: Request) -> Response:
    """Do not offer a question to this annotator again."""
    asked = parse(SkipRequest, await request.body())
    prompt = [message.plain() for message in asked.prompt]
    opened(request)
    await written(request.app.state.questions.skip, prompt, asked.annotator)
    return JSONResponse({"skipped": True})


ROUTES = [
    Route(f"/feedback/{name}", handler, methods=["POST"])
    for name, handler in {
        "answers": answers, "samples": samples, "rankings": rankings, "withdrawals": withdrawals,
        "opinions": opinions, "skips": skips,
    }.items()
]  # fmt: skip
