"""What people open in a browser: the page at `/` and the provenance behind it. Pages live in `serving/web/`."""

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from serving.errors import InputError
from serving.intake import naming, refusal
from serving.package import choose

if TYPE_CHECKING:
    from serving.package import Package

WEB = Path(__file__).parent / "web"


async def index(request: Request) -> Response:
    """Tell what answers here, and how to ask it."""
    from jinja2 import Environment

    package: Package = request.app.state.package
    page = Environment(autoescape=True).from_string((WEB / "index.html").read_text(encoding="utf-8"))
    stages = [record["stage"] for record in package.provenance.get("stages", [])]
    return HTMLResponse(
        page.render(
            tag=package.tag,
            base=str(request.base_url).rstrip("/"),
            limits=package.text.limits,
            names=len(package.masks.candidates.names),
            stages=stages,
        )
    )


async def provenance(request: Request) -> Response:
    """Tell what a model was made from: every stage's record, the sources, the evaluation. `?model=` names another."""
    try:
        model = choose(request.app.state.models, request.query_params.get("model"))
    except InputError as error:
        return refusal(error)
    return JSONResponse(model.provenance, headers=naming(model.tag))


ROUTES = [Route("/", index), Route("/provenance", provenance)]
