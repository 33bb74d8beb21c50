"""Code changes by function: a stage's digests at its last run compared with those of the current code.

DVC itself sees only that the stage `code` is due, and which stages that affects only after it has run. `plan` must
report it before, so if `code` is due, its outputs are computed here with the functions of the stage.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.common.code import stages
from tasks.common.settings import BessemerError

PredictedDigests = Mapping[str, str]  # path of a digest file -> contents that the stage `code` would write


class CodeError(BessemerError):
    """The project's code cannot be parsed; the text names file and line."""


def is_digest_file(path: str) -> bool:
    """Whether a path of the project is a digest file."""
    return PurePosixPath(path).parent == PurePosixPath(stages.DIGEST_FOLDER)


def predict_digests(paths: Iterable[str], project: Path) -> dict[str, str]:
    """Return the digest files that the stage `code` would write now; raise CodeError on a syntax error."""
    try:
        return {path: stages.to_json(_code(PurePosixPath(path).stem, project)) for path in paths}
    except SyntaxError as error:
        raise CodeError(f"{error.filename}, line {error.lineno}: {error.msg}; fix it first.") from error
    except FileNotFoundError as error:
        raise CodeError(f"{error.filename} is missing, but dvc.yaml has a stage for it. Restore it first.") from error


def reason(dep: Any, path: str, project: Path, predicted: PredictedDigests) -> str | None:
    """Return which code changed since a DVC stage last ran, from its dependency on a digest file; None if none did."""
    locked = dep.hash_info.value if dep.hash_info else None
    if path in predicted:
        text = predicted[path]
        if _md5(text) == locked:
            return None
    else:
        states = [state for state in dep.status().values() if isinstance(state, str)]
        if not states:
            return None
        if states == ["deleted"]:
            return f"code: {path} is missing"
        text = (project / path).read_text(encoding="utf-8")
    old = _digests_at_last_run(dep, locked)
    if old is None:
        return f"code: {path} (its previous version is not in DVC's cache)"
    return f"code: {'; '.join(stages.changed_definitions(old, json.loads(text)))}"


def _code(stage: str, project: Path) -> stages.Code:
    return stages.digest_module(stages.module_of_stage(stage, project), project)


def _digests_at_last_run(dep: Any, locked: str | None) -> stages.Code | None:
    """Return the digests of a stage's last run, from the file or DVC's cache; None if neither has that version."""
    cached = dep.repo.cache.local.oid_to_path(locked) if locked else ""
    for path in map(Path, (dep.fs_path, cached) if locked else ()):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if _md5(text) == locked:
            found: stages.Code = json.loads(text)
            return found
    return None


def _md5(text: str) -> str:
    """Return DVC's hash of a file."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
