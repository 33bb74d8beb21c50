"""Identity: hashes of everything that a result depends on.

The recipe hash of a stage covers its code (`tasks/common/code`), its settings, the numerics, the runtime lock and the
hashes of its inputs, but not where and how the stage ran (paths, hosts, worker counts, times). The identity of a model
is its recipe hash and the hash of its bytes; the input hashes include its parents.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOCK_FILE = Path("requirements.lock")
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
    return hash_json([list(pair) for pair in file_hashes(path).items()])


def file_hashes(path: Path) -> dict[str, str]:
    """Return the sha256 of each file in a folder by its relative path, sorted; for a file, {name: sha256}."""
    if path.is_file():
        return {path.name: file_hash(path)}
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return {item.relative_to(path).as_posix(): file_hash(item) for item in files}


def hash_json(value: Any) -> str:
    """Return the sha256 of a JSON value in canonical form; raise TypeError for values without stable bytes."""
    check_stable(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_stable(value: Any, where: str = "value") -> None:
    """Raise TypeError if a value's bytes could differ between runs or machines."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is not a string, so it has no stable bytes")
            check_stable(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_stable(item, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value} is not a finite number, so it has no stable bytes")
    elif value is not None and not isinstance(value, (str, int, bool)):
        raise TypeError(f"{where}: a {type(value).__name__} has no stable bytes; use text, numbers, lists and mappings")


def lock_hash(path: Path = LOCK_FILE) -> str:
    """Return the hash of the pinned runtime packages, without comments, order and local build tags (`+cpu`)."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return hash_json(sorted(re.sub(r"\+[\w.]+$", "", line).lower() for line in lines if line))


def recipe(
    *,
    code: str,
    settings: Any,
    numerics: Any,
    seed: int,
    lock: str,
    inputs: Mapping[str, str],
    key: str | None,
) -> str:
    """Return the recipe hash of a stage from its parts; `inputs` maps project paths to content hashes."""
    parts = {"code": code, "settings": settings, "numerics": numerics, "seed": seed, "lock": lock}
    return hash_json({**parts, "inputs": dict(inputs), "key": key})


def tag(recipe_hash: str, content_hash: str) -> str:
    """Return the short name of a model: the first digits of its recipe hash and of its content hash."""
    return f"{recipe_hash[:TAG_LENGTH]}-{content_hash[:TAG_LENGTH]}"
