"""Chat with the packaged model in a terminal: `bessemer chat`, or `python -m serving.chat [QUESTION]`.

Each question starts a new conversation, as in training. Answers are streamed.
"""

import sys
from typing import TextIO

from serving.decoding import Sampling
from serving.engine import TextEngine
from serving.errors import InputError, ServingError
from serving.package import Package, open_package

PROMPT = "you> "
QUIT = ("/quit", "/exit", "/q")


def chat(
    package: Package, question: str | None = None, sampling: Sampling | None = None, out: TextIO | None = None
) -> int:
    """Answer one question, or chat until the user quits; return the exit code."""
    out = out or sys.stdout
    if question is not None:
        print_answer(package.text, question, sampling, out)
    else:
        engine = package.text
        print(f"{package.tag}\nAsk a question. /quit or Ctrl-D quits.", file=out, flush=True)
        _talk(engine, sampling, out)
    return 0


def _talk(engine: TextEngine, sampling: Sampling | None, out: TextIO) -> None:
    import readline  # noqa: F401  gives input() its history and line editing

    while True:
        try:
            line = input(PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        if line in QUIT:
            return
        if not line:
            continue
        try:
            print_answer(engine, line, sampling, out)
        except InputError as error:
            print(error, file=out)
        except KeyboardInterrupt:
            print(" ... stopped", file=out)


def print_answer(engine: TextEngine, question: str, sampling: Sampling | None, out: TextIO) -> None:
    """Print an answer as it is generated."""
    for piece in engine.start([{"role": "user", "content": question}], sampling):
        print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)


def main(arguments: list[str]) -> int:
    """Chat, or answer the question in `arguments`."""
    try:
        return chat(open_package(), " ".join(arguments) or None)
    except ServingError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
