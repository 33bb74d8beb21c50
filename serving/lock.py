"""Write `serving/requirements.txt`: what the service needs, all pinned, and nothing of training.

Run as `python -m serving.lock`, in the environment that `requirements.lock` makes. It follows the requirements of a
few packages through what is installed there, so that the service answers with the very versions that the chain was
evaluated with, and it needs no network.
"""

import re
from importlib.metadata import distribution
from pathlib import Path

ROOTS = (
    "bentoml", "jinja2", "numpy", "onnxruntime", "onnxruntime-genai", "pydantic", "pydantic-core", "starlette",
    "tokenizers",
)  # fmt: skip
FILE = Path(__file__).with_name("requirements.txt")
HEADER = """\
# What the service runs on, and all that goes into its container. Made by `python -m serving.lock` from what
# requirements.lock installs: those packages of it that the service needs, in the same versions.
"""


def closure(roots: tuple[str, ...] = ROOTS) -> dict[str, str]:
    """Return name -> version of the roots and of everything that they require here, directly or not."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = [(root, frozenset[str]()) for root in roots]
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        # A local tag (`+cpu`) names a build, not a version that an index would know.
        found[name] = distribution(name).version.partition("+")[0]
        pending += _requirements(name, extras)
    return dict(sorted(found.items()))


def _requirements(name: str, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    from packaging.requirements import Requirement

    result = []
    for line in distribution(name).requires or ():
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            result.append((re.sub(r"[-_.]+", "-", needed.name).lower(), frozenset(needed.extras)))
    return result


def text() -> str:
    """Return the file's text as it should be now."""
    return HEADER + "".join(f"{name}=={version}\n" for name, version in closure().items())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"{FILE}: {len(closure())} packages")
