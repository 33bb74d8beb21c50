"""Default names of the sources in `ingest.sources`: from their paths, distinct."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

NAME_PATTERN = r"^[\w.-]+$"
RESERVED_NAMES = ("statements", "prose")  # groups of all documents with names of entities, and without
OTHER_SUFFIXES = (".gz", ".zst", ".zstd")


def fill_names(sources: Sequence[Any]) -> list[Any]:
    """Return the sources of `params.yaml`, each without a name with one from its path.

    A name that is taken or reserved gets a number: `pages`, `pages-2`. What is no mapping stays as it is.
    """
    taken = {str(source[key]) for source in sources if isinstance(source, Mapping) for key in ("name", "group")
             if source.get(key)}.union(RESERVED_NAMES)  # fmt: skip
    named = []
    for source in sources:
        if isinstance(source, Mapping) and source.get("name") is None:
            name = _distinct(_default_name(source), taken)
            taken.add(name)
            source = {**source, "name": name}
        named.append(source)
    return named


def _default_name(source: Mapping[str, Any]) -> str:
    """Return the name of the file, folder, data set, table or package that a source reads."""
    files = source.get("files")
    first = files[0] if isinstance(files, Sequence) and files and isinstance(files[0], Mapping) else {}
    data_files = source.get("data_files")
    path = (
        first.get("url")
        or (data_files[0] if isinstance(data_files, Sequence) and data_files else None)
        or source.get("path")
        or source.get("from_table")
        or str(source.get("requirement") or source.get("kind")).partition("==")[0]
    )
    parts = [part for part in str(path).split("/") if part and not re.search(r"[*?\[]", part)]
    stem = PurePosixPath(parts[-1] if parts else "files")
    stem = PurePosixPath(stem.stem) if stem.suffix in OTHER_SUFFIXES else stem
    return re.sub(r"[^\w.-]+", "-", stem.stem).strip("-") or "files"


def _distinct(name: str, taken: set[str]) -> str:
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate
