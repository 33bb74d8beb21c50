"""The BentoML service: `bentoml serve`, `make serve` and the Bento's container all run this.

Importing this module is cheap: the engines' libraries are loaded when the service starts, and torch never is.
BentoML ships no types for its decorators, hence the three exceptions for mypy.
"""

import logging

import bentoml
from starlette.applications import Starlette
from starlette.responses import Response

from serving import names, openai_api, pages
from serving.errors import InputError, PackageError
from serving.intake import Intake, refusal
from serving.package import open_package
from serving.requests import GenerateAnswer, GenerateRequest, MaskAnswer, MaskName, MaskRequest

TIMEOUT_SECONDS = 300
THREADS = 32  # requests that take turns at the model; more wait in line, none is turned away

logger = logging.getLogger("bentoml.bessemer")
web = Starlette(routes=[*pages.ROUTES, *openai_api.ROUTES])


@bentoml.service(name="Bessemer", workers=1, threads=THREADS, traffic={"timeout": TIMEOUT_SECONDS})
@bentoml.asgi_app(web, path="/")
class Bessemer:
    """A model made by Bessemer: it answers questions, fills in names, and tells what it was made from."""

    def __init__(self) -> None:
        web.state.package = web.state.problem = None
        try:
            package = open_package()
            # Loaded now, not with the first request.
            self.text, self.masks = package.text, package.masks
            web.state.package = package
        except PackageError as error:
            # To stop here would only make BentoML start another worker, again and again.
            logger.error("%s Then start the service again; until then every request gets 503.", error)
            web.state.problem = str(error)

    def __is_ready__(self) -> bool:
        """Tell `/readyz` whether there is a model to answer with."""
        return web.state.package is not None

    @bentoml.api(route="/generate", input_spec=GenerateRequest, output_spec=GenerateAnswer)  # type: ignore[untyped-decorator]
    def generate(
        self,
        input: str,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> GenerateAnswer | Response:
        """Answer one question with the policy."""
        request = GenerateRequest(
            input=input, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        try:
            answer = self.text.generate([{"role": "user", "content": input}], request.sampling())
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


BODIES = {"/generate": GenerateRequest, "/fill-mask": MaskRequest}
Bessemer.add_asgi_middleware(Intake, bodies=BODIES, state=web.state)  # type: ignore[attr-defined]
