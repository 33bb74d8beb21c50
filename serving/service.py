"""The BentoML service, run by `bentoml serve`, `make serve` and the Bento's container.

Importing this module is cheap: the inference libraries are loaded when the service starts. torch is never imported.
BentoML's decorators are untyped, hence the four mypy ignores.
"""

import logging
import time

import bentoml
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from serving import folders, names, openai_api, pages
from serving.browser_access import BrowserAccess
from serving.errors import InputError, PackageError
from serving.examples import Messages, prompts_to_rank
from serving.feedback import api as feedback_api
from serving.feedback.judgements import FeedbackError
from serving.feedback.store import Store
from serving.middleware import RequestMiddleware, error_response
from serving.package import Model, choose, open_models, open_package
from serving.questions import Questions
from serving.requests import (
    ClassifyAnswer,
    ClassifyRequest,
    ClassifyResult,
    GenerateAnswer,
    GenerateRequest,
    LabelScore,
    MaskAnswer,
    MaskName,
    MaskRequest,
)

TIMEOUT_SECONDS = 300
THREADS = 32  # concurrent encoder calls; further calls are queued

logger = logging.getLogger("bentoml.bessemer")
web = Starlette(routes=[*pages.ROUTES, *feedback_api.ROUTES, *openai_api.ROUTES])


@bentoml.service(name="Bessemer", workers=1, threads=THREADS, traffic={"timeout": TIMEOUT_SECONDS})
@bentoml.asgi_app(web, path="/")
class Bessemer:
    """A model trained by Bessemer: answers questions, fills in names, classifies texts, and reports its provenance."""

    def __init__(self) -> None:
        web.state.package, web.state.models, web.state.problem = None, {}, None
        prompts: list[Messages] = []
        try:
            package = open_package()
            models = open_models(package)
            for model in models.values():  # loaded at startup, not with the first request
                if model.has_chat:
                    load(model)
            if package.has_encoder:
                logger.info("%s fills in %d names", package.name, len(package.masks.candidates.names))
            if package.has_classifier:
                labels = package.classifier.labels
                logger.info("%s gives texts %s", package.name, f"{len(labels)} labels" if labels else "a number")
            prompts = prompts_to_rank(package)
            web.state.package, web.state.models = package, models
        except PackageError as error:
            # Do not raise: BentoML would restart the worker in a loop.
            logger.error("%s Then restart the service; until then every request gets status 503.", error)
            web.state.problem = str(error)
        web.state.store = web.state.questions = web.state.store_problem = None
        try:
            web.state.store = Store()
            web.state.questions = Questions(web.state.store, prompts)
        except FeedbackError as error:
            logger.error("%s Until then rankings are not available; all other requests are answered.", error)
            web.state.store_problem = str(error)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def drain(self) -> None:
        """Cancel unfinished requests; their clients are already disconnected."""
        for model in web.state.models.values():
            if model.has_chat:
                model.text.batch.drain()

    def __is_ready__(self) -> bool:
        """Report to `/readyz` whether a model is loaded."""
        return bool(web.state.models)

    @bentoml.api(route="/generate", input_spec=GenerateRequest, output_spec=GenerateAnswer)  # type: ignore[untyped-decorator]
    async def generate(
        self,
        input: str,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        model: str | None = None,
    ) -> GenerateAnswer | Response:
        """Answer one question, with the packaged model or another served one."""
        request = GenerateRequest(
            input=input, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, model=model
        )
        try:
            engine = choose(web.state.models, request.model).text
            # A model without a chat template answers no conversations: it completes the text.
            prompt = [{"role": "user", "content": input}] if engine.template else input
            answer = await run_in_threadpool(engine.start, prompt, request.sampling())
            await answer.finish_async()
        except InputError as error:
            return error_response(error)
        return GenerateAnswer(output=answer.text)

    @bentoml.api(route="/fill-mask", input_spec=MaskRequest, output_spec=MaskAnswer)  # type: ignore[untyped-decorator]
    def fill_mask(self, input: str, top: int = 5) -> MaskAnswer | Response:
        """Fill each [MASK] of a text with a whole name."""
        try:
            found = web.state.package.masks.fill(input, top)
        except InputError as error:
            return error_response(error)
        pieces = input.split(names.MASK)
        filled = pieces[0] + "".join(best[0].name + rest for best, rest in zip(found, pieces[1:], strict=True))
        rows = [MaskName(mask=at, name=name, score=score) for at, best in enumerate(found, 1) for name, score in best]
        return MaskAnswer(output=filled, names=rows)

    @bentoml.api(route="/classify", input_spec=ClassifyRequest, output_spec=ClassifyAnswer)  # type: ignore[untyped-decorator]
    def classify(self, input: tuple[str, ...], top: int | None = None) -> ClassifyAnswer | Response:
        """Give each text the probabilities of its labels or, with a regression model, a number."""
        try:
            engine = web.state.package.classifier
            rows = [engine.encode(text) for text in input]  # all are checked before the first is classified
            found = [engine.classify_ids(ids, top) for ids in rows]
        except InputError as error:
            return error_response(error)
        results = [
            ClassifyResult(labels=[LabelScore(label=label, score=score) for label, score in labels], value=value)
            for labels, value in found
        ]
        return ClassifyAnswer(results=results)


def load(model: Model) -> None:
    """Load a model's engine; log its load time and the process's memory."""
    began, before = time.perf_counter(), resident_bytes()
    weights = (model.folder / "chat" / folders.WEIGHTS_FILE).stat().st_size
    engine = model.text
    seconds, now = time.perf_counter() - began, resident_bytes()
    logger.info(
        "%s (%s): %.1f MB of weights, loaded in %.1f s; memory %+.0f MB, now %.0f MB. Context: %d tokens.",
        model.name, model.tag, weights / 1e6, seconds, (now - before) / 1e6, now / 1e6, engine.limits.context,
    )  # fmt: skip


def resident_bytes() -> int:
    """Return this process's resident memory in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


REQUEST_MODELS = {"/generate": GenerateRequest, "/fill-mask": MaskRequest, "/classify": ClassifyRequest}
Bessemer.add_asgi_middleware(RequestMiddleware, bodies=REQUEST_MODELS, state=web.state)  # type: ignore[attr-defined]
Bessemer.add_asgi_middleware(BrowserAccess)  # type: ignore[attr-defined]
