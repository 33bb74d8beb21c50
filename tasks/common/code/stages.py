"""One digest file per stage, `data/code/STAGE.json`: the digest of each definition in each module of its closure.

DVC tracks these files instead of the code, and the recipe contains the hash of the file's bytes.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tasks.common.code import closure
from tasks.common.code.digests import IMPORTS, ORDER, Digests, digest_source

DIGEST_FOLDER = Path("data/code")
Code = dict[str, Digests]  # a module's path to its definitions' digests


def digest_file(stage: str) -> Path:
    """Return the path of a stage's digest file."""
    return DIGEST_FOLDER / f"{stage}.json"


def module_of_stage(stage: str, root: Path = Path()) -> str:
    """Return the name of a stage's module: `tasks.STAGE.stage` if `tasks.STAGE` is a package, else `tasks.STAGE`."""
    return f"tasks.{stage}.stage" if (root / "tasks" / stage).is_dir() else f"tasks.{stage}"


def digest_module(module: str, root: Path = Path()) -> Code:
    """Return the digests of all code in a stage module's closure; raise SyntaxError with file and line."""
    computes = _uses_numerics(closure.file_of(module, root))
    code: Code = {}
    for path in closure.files(module, root):
        name = path.as_posix()
        errors = next((kinds for folder, kinds in closure.DATA_ERRORS.items() if path.is_relative_to(folder)), ())
        excluded = {*closure.EXCLUDED_DEFINITIONS.get(name, ()), *(() if computes else _numerics_definitions(name))}
        found = digest_source((root / path).read_text(encoding="utf-8"), errors)
        kept = {part: digest for part, digest in found.items() if part.partition(".")[0] not in excluded}
        if kept.keys() - {IMPORTS}:
            code[name] = kept
    return code


def to_json(code: Code) -> str:
    """Return the contents of a digest file."""
    return json.dumps(code, indent=1, ensure_ascii=True) + "\n"


def digest_code(code: Code) -> str:
    """Return the digest of a stage's whole code, which is the sha256 of its digest file."""
    return hashlib.sha256(to_json(code).encode()).hexdigest()


def changed_definitions(before: Code, now: Code) -> Iterator[str]:
    """Yield the differences, one line per module: `tasks/align/estimates.py: gae`."""
    for path in sorted({*before, *now}):
        if path not in before or path not in now:
            yield f"{path} ({'removed' if path not in now else 'new'})"
        elif before[path] != now[path]:
            yield f"{path}: {', '.join(_changed(before[path], now[path]))}"


def _changed(before: Digests, now: Digests) -> list[str]:
    """Return the definitions that differ; imports and order are listed only if no definition differs."""
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    words = [name if name in before and name in now else f"{name} ({'new' if name in now else 'removed'})"
             for name in names if name not in (IMPORTS, ORDER)]  # fmt: skip
    return words or [name.strip("()") for name in names]


def _numerics_definitions(path: str) -> tuple[str, ...]:
    return closure.NUMERICS_DEFINITIONS if path == "tasks/common/settings.py" else ()


def _uses_numerics(path: Path) -> bool:
    """Return whether a stage's module computes with a model: its `NUMERICS`, by default True."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "NUMERICS" for target in node.targets):
            return bool(ast.literal_eval(node.value))
    return True
