"""What people open in a browser: chat (`/`), ranking (`/rank`), lineage (`/provenance`), help for programs (`/api`).

The pages are files of our own in `serving/web/`, without a build step and without anything from elsewhere. Their
Content-Security-Policy lets no other script run, and no text become HTML: scripts can only insert text.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from serving.errors import InputError
from serving.feedback_api import opened, written
from serving.intake import naming, refusal
from serving.judgements import FEWEST, MOST, Answer, FeedbackError
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
    "Cache-Control": "no-cache",  # asked again each time, so that a newer service's pages are seen at once
}
HASH_DIGITS = 12  # of a hash where it is shown to people; the whole one is in its title


class Assets(StaticFiles):
    """The pages' styles and scripts."""

    async def get_response(self, path: str, scope: "Scope") -> Response:
        """Serve a file under the same headers as the pages."""
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
    """Show the page to talk to the models on."""
    return page("chat.html", request)


async def rank(request: Request) -> Response:
    """Show the page to rank answers on."""
    return page("rank.html", request, counts=range(FEWEST, MOST + 1))


async def api(request: Request) -> Response:
    """Tell how programs ask what answers here."""
    package: Package = request.app.state.package
    return page(
        "api.html",
        request,
        limits=package.text.limits,
        names=len(package.masks.candidates.names),
    )


async def provenance(request: Request) -> Response:
    """Tell what a model was made from: to a browser as a page, to everybody else as JSON.

    `?model=` names another model than the packaged one; `?answer=` the one that gave an answer, by the answer's id.
    """
    readable = "text/html" in request.headers.get("accept", "")
    try:
        answer = await _answer(request)
        model = choose(request.app.state.models, answer.model if answer else request.query_params.get("model"))
    except (InputError, FeedbackError) as error:
        found = error if isinstance(error, InputError) else InputError(str(error), status=503)
        return page("problem.html", request, found.status, problem=str(error)) if readable else refusal(found)
    headers = {**naming(model.tag), "Vary": "Accept"}
    if not readable:
        return JSONResponse(model.provenance, headers=headers)
    shown = page("lineage.html", request, model=model, answer=answer, made=model.provenance, digits=HASH_DIGITS)
    shown.headers.update(headers)
    return shown


async def _answer(request: Request) -> Answer | None:
    identifier = request.query_params.get("answer")
    return None if identifier is None else await written(opened(request).answer, identifier)


ROUTES = [
    Route("/", chat),
    Route("/rank", rank),
    Route("/api", api),
    Route("/provenance", provenance),
    Mount("/assets", Assets(directory=WEB / "assets")),
]
