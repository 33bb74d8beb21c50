"""`bessemer serve`, `rank` and `chat`: the endpoint of this project and its additional models."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from flows import models, rankings
from serving import chat as terminal
from serving import serve as endpoint
from serving.examples import NEUTRAL_QUESTION, SHORT_CHARACTERS, can_answer, read_examples
from serving.package import open_package, package_folder
from serving.questions import FILE
from tasks.common.settings import BessemerError


def serve(
    project: Path, host: str, port: int, others: Sequence[str], message: str | None = None, origins: Sequence[str] = ()
) -> NoReturn:
    """Replace this process by the endpoint with the packaged model and `others`, which are exported first if needed.

    `message` is printed before the endpoint starts; `origins` are sites whose pages may use it.
    """
    endpoint.check_free(port, host)  # fail before an export, which takes a while
    open_package()
    folders = models.prepare_models(project, others)
    if message:
        print(message, flush=True)
    endpoint.serve(port, host, folders or None, origins)


def rank(project: Path, host: str, port: int, others: Sequence[str]) -> None:
    """Print the address of the ranking page of the running endpoint, or start an endpoint with these models."""
    models.resolve_models(project, others)
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0") else host
    instructions = f"Rank answers at http://{name}:{port}/rank, and then: bessemer rank export"
    served = endpoint.served_models(port, host)
    if served is None:
        if not others and package_folder().is_dir() and not (package := open_package()).has_chat:
            raise BessemerError(f"{package.missing('chat')} To rank the answers of another model, name it: --with.")
        file = rankings.store_folder(project) / FILE
        offered = f"The page offers the questions in {file}, one per line; without any, prompts of the project's data."
        serve(project, host, port, others, f"{instructions}\n{offered}")
    missing = [name for name in others if name not in served]
    if missing:
        option = f"--port {endpoint.alternative_port(port, endpoint.PORT)}"
        raise BessemerError(
            f"The endpoint on port {port} does not serve {', '.join(missing)}: stop it (Ctrl-C in its terminal) and "
            f"run this command again, or start a second endpoint with `{option}`."
        )
    print(f"The endpoint is running. {instructions}")


def chat(project: Path, question: str | None, name: str | None) -> None:
    """Ask the packaged model, or the one called `name`, a question; an empty one starts a chat, None asks samples."""
    package = open_package(models.prepare_models(project, [name])[name] if name else None)
    if name is None and not package.has_chat:
        print(f"{package.missing('chat')} `bessemer serve` starts the endpoint.")
        return
    if question is not None:
        terminal.chat(package, question or None)
        return
    samples = read_examples(package_folder()).samples  # of this project, also for another of its models
    usable = [sample for sample in samples if can_answer(package, [{"role": "user", "content": sample}])]
    for sample in usable or [NEUTRAL_QUESTION]:
        print(f"> {textwrap.shorten(sample, SHORT_CHARACTERS, placeholder=' …')}", flush=True)
        terminal.chat(package, sample)
