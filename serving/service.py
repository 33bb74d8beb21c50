"""The BentoML service: `bentoml serve`, `make serve` and the Bento's container all run this.

Importing this module is cheap: the engines' libraries are loaded when the service starts, and torch never is.
BentoML ships no types for its decorators, hence the three exceptions for mypy.
"""

import logging
import time

import bentoml
from starlette.applications import Starlette
from starlette.responses import Response

from serving import feedback_api, names, openai_api, pages
from serving.errors import InputError, PackageError
from serving.feedback import Store
from serving.intake import Intake, refusal
from serving.judgements import FeedbackError
from serving.package import Model, choose, open_models, open_package
from serving.questions import Questions
from serving.requests import GenerateAnswer, GenerateRequest, MaskAnswer, MaskName, MaskRequest

TIMEOUT_SECONDS = 300
THREADS = 32  # requests that take turns at the model; more wait in line, none is turned away

logger = logging.getLogger("bentoml.bessemer")
web = Starlette(routes=[*pages.ROUTES, *feedback_api.ROUTES, *openai_api.ROUTES])


@bentoml.service(name="Bessemer", workers=1, threads=THREADS, traffic={"timeout": TIMEOUT_SECONDS})
@bentoml.asgi_app(web, path="/")
class Bessemer:
    """A model made by Bessemer: it answers questions, fills in names, and tells what it was made from."""

    def __init__(self) -> None:
        web.state.package, web.state.models, web.state.problem = None, {}, None
        try:
            package = open_package()
            models = open_models(package)
            for model in models.values():  # loaded now, not with the first request
                load(model)
            self.masks = package.masks
            web.state.package, web.state.models = package, models
        except PackageError as error:
            # To stop here would only make BentoML start another worker, again and again.
            logger.error("%s Then start the service again; until then every request gets 503.", error)
            web.state.problem = str(error)
        web.state.store = web.state.questions = web.state.store_problem = None
        try:
            web.state.store = Store()
            web.state.questions = Questions(web.state.store)
        except FeedbackError as error:
            logger.error("%s Until then nobody can rank; everything else is answered.", error)
            web.state.store_problem = str(error)

    def __is_ready__(self) -> bool:
        """Tell `/readyz` whether there is a model to answer with."""
        return bool(web.state.models)

    @bentoml.api(route="/generate", input_spec=GenerateRequest, output_spec=GenerateAnswer)  # type: ignore[untyped-decorator]
    def generate(
        self,
        input: str,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        model: str | None = None,
    ) -> GenerateAnswer | Response:
        """Answer one question, with the packaged model or another one that is served here."""
        request = GenerateRequest(
            input=input, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, model=model
        )
        try:
            engine = choose(web.state.models, request.model).text
            answer = engine.generate([{"role": "user", "content": input}], request.sampling())
        except InputError as error:
            return refusal(error)
        return GenerateAnswer(output=answer.text)

    @bentoml.api(route="/fill-mask", input_spec=MaskRequest, output_spec=MaskAnswer)  # type: ignore[untyped-decorator]
    def fill_mask(self, input: str, top: int = 5) -> MaskAnswer | Response:
        """Fill each [MASK] of a text with a whole name."""
        try:
            found = self.masks.fill(input, top)
        except InputError as error:
            return refusal(error)
        pieces = input.split(names.MASK)
        filled = pieces[0] + "".join(best[0].name + rest for best, rest in zip(found, pieces[1:], strict=True))
        rows = [MaskName(mask=at, name=name, score=score) for at, best in enumerate(found, 1) for name, score in best]
        return MaskAnswer(output=filled, names=rows)


def load(model: Model) -> None:
    """Load a model's engine, and log what it and the whole process now take."""
    began, before = time.perf_counter(), resident_bytes()
    weights = (model.folder / "policy" / "model.onnx").stat().st_size
    engine = model.text
    seconds, now = time.perf_counter() - began, resident_bytes()
    logger.info(
        "%s (%s): %.1f MB of weights, loaded in %.1f s; memory %+.0f MB, now %.0f MB. Context: %d tokens.",
        model.name, model.tag, weights / 1e6, seconds, (now - before) / 1e6, now / 1e6, engine.limits.context,
    )  # fmt: skip


def resident_bytes() -> int:
    """Return how much memory this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)


BODIES = {"/generate": GenerateRequest, "/fill-mask": MaskRequest}
Bessemer.add_asgi_middleware(Intake, bodies=BODIES, state=web.state)  # type: ignore[attr-defined]
