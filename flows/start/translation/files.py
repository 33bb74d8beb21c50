"""Finds and looks into the files that another tool's configuration names."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from flows.start.translation.keys import Keys
from flows.start.translation.result import Draft

HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst")
ROWS_LOOKED_AT = 50
ROWS_COUNTED = 50_000  # of a file; the number of further rows is estimated from their bytes


def find(path: str, config: Path) -> Path | None:
    """Return the absolute path that a configuration means, or None if nothing is there.

    Both tools read relative paths from the folder in which they are started, mostly the root of their repository; so
    the current folder, the folder of the file and the folders above it are tried in this order.
    """
    given = Path(path).expanduser()
    if given.is_absolute():
        return given if _exists(given) else None
    folders = (Path.cwd(), *config.resolve().parents)
    return next(((folder / given).resolve() for folder in folders if _exists(folder / given)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def is_hub_name(path: str) -> bool:
    """Return whether a path that does not exist can be a name on a hub: `owner/name`, without a file's ending."""
    return HUB_NAME.match(path) is not None and not path.endswith(DATA_SUFFIXES) and not path.startswith(".")


def read_folder(keys: Keys, key: str, path: str | None, config: Path, draft: Draft) -> Path | None:
    """Return the folder of a model; name one that is on a hub as not translated. A missing folder is a problem."""
    if path is None:
        keys.problems.append(f"{key}: this key is missing; it should name the folder of a model")
        return None
    found = find(path, config)
    if found is None and is_hub_name(path):
        folder = path.rpartition("/")[2]
        draft.leave(
            key, path, "a name on a hub pins no bytes",
            f"download it (hf download {path} --local-dir models/{folder}) and give its folder with --checkpoint",
        )  # fmt: skip
    elif found is None or not found.is_dir():
        keys.problems.append(f"{key}: found {path}, expected the folder of a model; there is none")
        return None
    return found


def first_rows(path: Path) -> list[dict[str, Any]]:
    """Return the first objects of a file of rows; lines that are no objects are left to `ingest`.

    Raises UnreadableFile for a file of another kind.
    """
    return list(_objects(path))


def count_rows(path: Path) -> int:
    """Return the number of rows of a file, usable or not; of a large file, an estimate from its first rows.

    Raises UnreadableFile for a file of another kind.
    """
    from tasks.ingest import formats
    from tasks.ingest.source_files import SourceFile

    file, number = SourceFile(path, path.name), 0
    for number, _ in enumerate(formats.read(file, formats.detect(file), True, None, frozenset()), 1):
        if number == ROWS_COUNTED and file.bytes_read:
            return round(number * path.stat().st_size / file.bytes_read)
    return number


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    from tasks.ingest import formats
    from tasks.ingest.source_files import SourceFile

    file = SourceFile(path, path.name)
    found = formats.read(file, formats.detect(file), False, None, frozenset())
    for _, row in islice(found, ROWS_LOOKED_AT):
        try:
            value = json.loads(row) if isinstance(row, str | bytes) else row
        except ValueError:
            continue
        if isinstance(value, Mapping):
            yield dict(value)
