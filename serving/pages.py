"""The web pages: chat (`/`), ranking (`/rank`), lineage (`/provenance`) and API help (`/api`).

The pages are the files in `serving/web/`, without a build step or external resources. Their Content-Security-Policy
allows no other scripts, and trusted types keep the scripts from inserting HTML.
"""

import json
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from serving.errors import InputError
from serving.feedback.api import require_store, run_blocking
from serving.feedback.judgements import MAX_ANSWERS, MIN_ANSWERS, Answer, FeedbackError
from serving.middleware import error_response, model_header
from serving.package import choose

if TYPE_CHECKING:
    from jinja2 import Environment
    from starlette.types import Scope

    from serving.package import Model, Package

WEB = Path(__file__).parent / "web"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # always revalidated, so that a new version is shown at once
}
HASH_DIGITS = 12  # shown of a hash; the full hash is in the tooltip


class Assets(StaticFiles):
    """Static files: styles and scripts."""

    async def get_response(self, path: str, scope: "Scope") -> Response:
        """Serve a file with the headers of the pages."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, FileSystemLoader

    return Environment(autoescape=True, loader=FileSystemLoader(WEB))


def page(name: str, request: Request, status: int = 200, **values: Any) -> Response:
    """Render one of the pages in `serving/web/`."""
    served: list[Model] = list(request.app.state.models.values())
    plain = [{"name": model.name, "tag": model.tag} for model in served]
    base = str(request.base_url).rstrip("/")
    content = _templates().get_template(name).render(models=plain, base=base, **values)
    return HTMLResponse(content, status, headers=HEADERS)


async def chat(request: Request) -> Response:
    """Render the chat page."""
    return _without_chat(request) or page("chat.html", request, hint=_hint(request))


async def rank(request: Request) -> Response:
    """Render the ranking page."""
    counts = range(MIN_ANSWERS, MAX_ANSWERS + 1)
    return _without_chat(request) or page("rank.html", request, hint=_hint(request), counts=counts)


def _without_chat(request: Request) -> Response | None:
    """Return a page that says what to use instead, if no chat model is served; otherwise None."""
    package: Package = request.app.state.package
    if any(model.has_chat for model in request.app.state.models.values()):
        return None
    return page("problem.html", request, problem=f"{package.missing('chat')} The page at /api has examples.")


def _hint(request: Request) -> str:
    """Return what an empty field for a question shows."""
    package: Package = request.app.state.package
    return f"Ask a question, such as: {package.examples.samples[0]}" if package.examples.samples else "Ask a question"


async def api(request: Request) -> Response:
    """Render the API help page."""
    package: Package = request.app.state.package
    question = package.examples.question
    head, message = _json({"model": package.name, "stream": True})[:-1], _json({"role": "user", "content": question})
    bodies = {
        "generate": _json({"input": question}),
        "masked": _json({"input": package.examples.masked_text}),
        "classified": _json({"input": package.examples.classified_text}),
        "chat": f'{head}, "messages": [\n         {message}]}}',
    }
    return page(
        "api.html",
        request,
        bodies={name: shlex.quote(body) for name, body in bodies.items()},
        limits=package.text.limits if package.has_chat else None,
        names=len(package.masks.candidates.names) if package.has_encoder else 0,
        classifier=package.classifier if package.has_classifier else None,
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


async def provenance(request: Request) -> Response:
    """Return a model's provenance: a page for browsers, JSON otherwise.

    `?model=` selects a model by name or tag, `?answer=` the model of an answer by the answer's id.
    """
    wants_html = "text/html" in request.headers.get("accept", "")
    try:
        answer = await _answer(request)
        model = choose(request.app.state.models, answer.model if answer else request.query_params.get("model"))
    except (InputError, FeedbackError) as error:
        found = error if isinstance(error, InputError) else InputError(str(error), status=503)
        return page("problem.html", request, found.status, problem=str(error)) if wants_html else error_response(found)
    headers = {**model_header(model.tag), "Vary": "Accept"}
    if not wants_html:
        return JSONResponse(model.provenance, headers=headers)
    response = page("lineage.html", request, model=model, answer=answer, made=model.provenance, digits=HASH_DIGITS)
    response.headers.update(headers)
    return response


async def _answer(request: Request) -> Answer | None:
    identifier = request.query_params.get("answer")
    return None if identifier is None else await run_blocking(require_store(request).answer, identifier)


ROUTES = [
    Route("/", chat),
    Route("/rank", rank),
    Route("/api", api),
    Route("/provenance", provenance),
    Mount("/assets", Assets(directory=WEB / "assets")),
]
