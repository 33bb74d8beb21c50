"""Identity: what a result was made from, as hashes.

The recipe hash of a stage covers its code (the stage module and every local module it imports, directly or not), its
settings, the numerics, the runtime lock and the hashes of its inputs. Where and how the stage ran (paths, hosts,
worker counts, times) stays out. The identity of a model is its recipe hash together with the hash of its bytes; its
parents are inside through the input hashes.
"""

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

LOCAL_PACKAGES = ("tasks", "serving")
LOCK = Path("requirements.lock")
TAG_LENGTH = 12


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_hash(path: Path) -> str:
    """Return the sha256 of a file, or of a folder's sorted (relative path, file hash) pairs."""
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist, so it has no hash")
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return hash_json([[item.relative_to(path).as_posix(), file_hash(item)] for item in files])


def hash_json(value: Any) -> str:
    """Return the sha256 of a JSON value in canonical form; raise TypeError for a value without stable bytes."""
    refuse_unstable(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_unstable(value: Any, where: str = "value") -> None:
    """Raise TypeError where a value's bytes could differ from run to run or from machine to machine."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is not a string, so it has no stable bytes")
            refuse_unstable(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            refuse_unstable(item, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value} is not a finite number, so it has no stable bytes")
    elif value is not None and not isinstance(value, (str, int, bool)):
        raise TypeError(f"{where}: a {type(value).__name__} has no stable bytes; use text, numbers, lists and mappings")


def lock_hash(path: Path = LOCK) -> str:
    """Return the hash of the pinned runtime packages: comments, order and local build tags (`+cpu`) do not count."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return hash_json(sorted(re.sub(r"\+[\w.]+$", "", line).lower() for line in lines if line))


def code_files(module: str, root: Path = Path()) -> list[Path]:
    """Return the files of a module and of every local module that it imports, sorted, relative to the project."""
    found: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += _local_imports(name, root)
    return sorted(_module_file(name, root).relative_to(root) for name in found)


def _module_file(name: str, root: Path) -> Path:
    path = root.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _local_imports(name: str, root: Path) -> tuple[str, ...]:
    file = _module_file(name, root)
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return tuple(sorted(set(_imported_modules(tree, root))))


def _imported_modules(tree: ast.AST, root: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for candidate in candidates:
            parts = candidate.split(".")
            if parts[0] in LOCAL_PACKAGES:
                names = (".".join(parts[: end + 1]) for end in range(len(parts)))
                yield from (name for name in names if _module_file(name, root).is_file())


def recipe(
    *,
    code: Mapping[str, str],
    settings: Any,
    numerics: Any,
    seed: int,
    lock: str,
    inputs: Mapping[str, str],
    key: str | None,
) -> str:
    """Return the recipe hash of a stage from its parts; `code` and `inputs` map project paths to content hashes."""
    parts = {"code": dict(code), "settings": settings, "numerics": numerics, "seed": seed, "lock": lock}
    return hash_json({**parts, "inputs": dict(inputs), "key": key})


def tag(recipe_hash: str, content_hash: str) -> str:
    """Return the short name of a model: the heads of its recipe hash and of its content hash."""
    return f"{recipe_hash[:TAG_LENGTH]}-{content_hash[:TAG_LENGTH]}"
