"""`bessemer serve` and `bessemer rank`: the endpoint of this project, and the models that it is to compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from flows import models, rankings
from serving import serve as endpoint
from serving.package import open_package
from serving.questions import FILE
from tasks.common.settings import BessemerError


def serve(project: Path, host: str, port: int, others: Sequence[str], first: str | None = None) -> NoReturn:
    """Turn this process into the endpoint: the packaged model and `others`, exported first where they have to be.

    `first` is said once nothing stands in the way.
    """
    endpoint.check_free(port, host)  # before an export that takes a while
    open_package()
    folders = models.ready(project, others)
    if first:
        print(first, flush=True)
    endpoint.serve(port, host, folders or None)


def rank(project: Path, host: str, port: int, others: Sequence[str]) -> None:
    """Say where answers are ranked, once an endpoint with these models answers there; start it where none does."""
    models.must_know(others)
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0") else host
    where = f"Rank answers at http://{name}:{port}/rank, and then: bessemer rank export"
    held = endpoint.running(port, host)
    if held is None:
        questions = rankings.store_folder(project) / FILE
        serve(project, host, port, others, f"{where}\nQuestions that are to wait there, one a line: {questions}")
    lacking = [name for name in others if name not in held]
    if lacking:
        advised = f"--port {endpoint.another(port, endpoint.PORT)}"
        raise BessemerError(
            f"The endpoint on port {port} answers without {', '.join(lacking)}: stop it (Ctrl-C where it runs) and "
            f"call this again, or start another one beside it with `{advised}`."
        )
    print(f"The endpoint is up. {where}")
