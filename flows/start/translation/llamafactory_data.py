"""Finds the data sets that a configuration of LLaMA-Factory names in its dataset_info.json."""

import json
from pathlib import Path
from typing import Any

from flows.start.translation.documents import ROW_KINDS, document_source, holds_rows, holds_text
from flows.start.translation.files import find
from flows.start.translation.keys import Keys
from flows.start.translation.result import Draft, Source

INFO_NAME = "dataset_info.json"
DOCUMENT_KEYS = ("file_name", "columns", "formatting")  # of a data set of plain text
FOLDER = "llamafactory"  # under data/sources/


def read_sources(keys: Keys, config: Path, stage: str, draft: Draft) -> tuple[Source, ...]:
    """Return the sources of the configuration's data sets; name those on a hub as not translated.

    A missing file, an unknown name and settings of a data set that have no counterpart are problems.
    """
    names = _names(keys)
    path = find(f"{keys.take('dataset_dir', 'data')}/{INFO_NAME}", config)
    if path is None:
        keys.problems.append(
            f"dataset_dir: found {keys.content.get('dataset_dir', 'data (the default)')}, expected a folder with "
            f"{INFO_NAME}, seen from here or from the folder of {config.name}; there is none"
        )
        return ()
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        keys.problems.append(f"dataset_dir: {path} is not JSON: {error}")
        return ()
    if not isinstance(listed, dict):
        keys.problems.append(f"dataset_dir: expected data sets by name in {path}, found {type(listed).__name__}")
        return ()
    local = [name for name in names if not _on_hub(name, listed, draft)]
    documents = stage == "pt"
    return _documents(path, listed, local, keys, draft) if documents else _rows(path, local, stage, keys)


def _names(keys: Keys) -> list[str]:
    given = keys.take("dataset", [])
    names = given if isinstance(given, list) else str(given).split(",")
    if not names:
        keys.problems.append("dataset: this key is missing; it should name data sets of dataset_info.json")
    return [str(name).strip() for name in names]


def _on_hub(name: str, listed: Any, draft: Draft) -> bool:
    from tasks.ingest.importers import HUB_KEYS

    entry = listed.get(name) if isinstance(listed, dict) else None
    key = next((key for key in HUB_KEYS if isinstance(entry, dict) and key in entry), None)
    if key is None or not isinstance(entry, dict):
        return False
    draft.leave(
        "dataset", name, f"{key} in {INFO_NAME} pins no bytes",
        f"download {entry[key]} and give file_name in {INFO_NAME}, or give the file to bessemer init",
    )  # fmt: skip
    return True


def _rows(path: Path, names: list[str], stage: str, keys: Keys) -> tuple[Source, ...]:
    """Return one source for conversations or preferences, which `ingest` reads with their dataset_info.json."""
    from tasks.ingest.importers import read_dataset_info

    if not names:
        return ()
    try:
        entries = read_dataset_info(path, names, path.parent)
    except ValueError as error:
        keys.problems.append(f"dataset: {error}")
        return ()
    wanted = "rankings" if stage in ("rm", "dpo") else "instructions"
    for name, entry in zip(names, entries, strict=True):
        if entry.layout.table != wanted:
            keys.problems.append(
                f"dataset: {name} has {entry.layout.table} (ranking in {INFO_NAME}), but stage {stage} needs {wanted}"
            )
        if not holds_rows(entry.path):
            keys.problems.append(f"dataset: {name} is {entry.path.name}, expected {ROW_KINDS}; convert it")
    files = {file.relative_to(path.parent.resolve()).as_posix(): file for file in _files(path, entries)}
    settings = {
        "name": FOLDER, "kind": "llamafactory", "path": f"{FOLDER}/{INFO_NAME}", "datasets": names
    }  # fmt: skip
    return (Source(settings, {f"{FOLDER}/{name}": file for name, file in files.items()}),)


def _files(path: Path, entries: list[Any]) -> list[Path]:
    return [path.resolve(), *(entry.path.resolve() for entry in entries)]


def _documents(path: Path, listed: dict[str, Any], names: list[str], keys: Keys, draft: Draft) -> tuple[Source, ...]:
    """Return a source of documents for each data set; their text is in the column of the prompt."""
    found = [_document(name, listed.get(name), path, keys, draft) for name in names]
    return tuple(source for source in found if source)


def _document(name: str, entry: Any, path: Path, keys: Keys, draft: Draft) -> Source | None:
    columns = entry.get("columns") or {} if isinstance(entry, dict) else None
    if not isinstance(columns, dict):
        keys.problems.append(f"dataset: {path} should have an object for {name} with file_name, found {entry!r:.60}")
        return None
    file = path.parent / str(entry.get("file_name"))
    if not file.is_file() or not holds_text(file):
        keys.problems.append(f"dataset: {name} should be a file of text, {ROW_KINDS}; found {file}")
        return None
    for key in sorted(set(entry) - set(DOCUMENT_KEYS)):
        draft.leave(f"dataset.{name}.{key}", entry[key], "all rows of a file are used", "make a file of the others")
    return document_source(name, file, str(columns.get("prompt", "instruction")), draft)
