"""The files that a path under data/sources/ names: one file, a folder, or a glob (`docs/**/*.md`).

They are read in the order of their paths. Files and folders whose name begins with a dot are not read.
"""

import os
from collections.abc import Iterator
from pathlib import Path

GLOB_CHARACTERS = frozenset("*?[")


def find(folder: Path, path: str) -> tuple[list[str], bool]:
    """Return the paths of the files, relative to the folder, and whether the path names one file."""
    target = folder / path
    if target.is_file():
        return [path], True
    if target.is_dir():
        return sorted(_walk(folder, target)), False
    if not GLOB_CHARACTERS.isdisjoint(path):
        pattern = f"{path}/*" if path.endswith("**") else path  # else it would match folders only
        matches = (item.relative_to(folder) for item in folder.glob(pattern) if item.is_file())
        return sorted(item.as_posix() for item in matches if not _is_hidden(item, Path(path))), False
    return [], True


def _walk(folder: Path, target: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(target):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder)
        prefix = f"{relative.as_posix()}/" if relative.parts else ""
        yield from (f"{prefix}{name}" for name in files if not name.startswith("."))


def _is_hidden(path: Path, pattern: Path) -> bool:
    """Whether a part of the path begins with a dot, unless the pattern names it."""
    return any(part.startswith(".") and part not in pattern.parts for part in path.parts)
