"""Finds the data sets that a configuration of axolotl lists, and says how `ingest` reads their rows.

Prompt types and the columns that they read are those of its `src/axolotl/prompt_strategies/`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.start.translation.axolotl_rows import Layout, pair_layout, prompt_layout
from flows.start.translation.documents import ROW_KINDS, document_source, holds_rows, holds_text
from flows.start.translation.files import find, first_rows, is_hub_name
from flows.start.translation.keys import Keys, Table
from flows.start.translation.result import Draft, Source

LOADERS = ("json", "csv", "parquet", "text", "arrow")  # `path` of a data set whose files are in data_files
DOCUMENT_TYPES = ("completion", "pretrain")
ROW_WITHOUT_EFFECT = ("ds_type", "trust_remote_code", "preprocess_shards", "chat_template", "conversation", "name")
ROW_UNSUPPORTED: Table = {
    "split": ("all rows of a file are used", "make a file of the rows that you want"),
    "shards": ("all rows of a file are used", "make a file of the rows that you want"),
    "shards_idx": ("all rows of a file are used", "make a file of the rows that you want"),
    "skip": ("all rows of a file are used", "make a file of the rows that you want"),
    "revision": ("it belongs to a name on the hub", "leave it out"),
    "chat_template_jinja": ("the chat template of the checkpoint decides", "write it into the checkpoint's tokenizer"),
    "drop_system_message": ("system turns are kept", "remove them from the file"),
    "message_field_training": ("every answer is trained on", "remove the others from the file"),
    "message_field_training_detail": ("every answer is trained on as a whole", "leave it out"),
    "roles_to_train": ("the loss covers the assistant's answers", "leave it out"),
    "train_on_eos": ("the end of every answer is trained on", "leave it out"),
    "train_on_eot": ("the end of every answer is trained on", "leave it out"),
    "field_tools": ("conversations are text: rows with tool calls are rejected", "leave them out"),
    "field_thinking": ("answers are trained on as they are", "write the reasoning into the answer"),
    "template_thinking_key": ("answers are trained on as they are", "write the reasoning into the answer"),
    "split_thinking": ("answers are trained on as they are", "leave it out"),
    "input_transform": ("rows are read as they are", "change the file"),
    "input_format": ("rows are read as they are", "change the file"),
}
SAME_AS_DEFAULT = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "split": "train"}


@dataclass(frozen=True)
class Data:
    """The sources of a configuration, and whether they are documents alone."""

    sources: tuple[Source, ...]
    only_documents: bool


def read_sources(keys: Keys, config: Path, table: str, draft: Draft) -> Data:
    """Return the sources of `datasets` and `pretraining_dataset`; name those on a hub as not translated."""
    listed = [
        (key, number, item)
        for key in ("datasets", "pretraining_dataset")
        for number, item in enumerate(_as_list(keys.take(key)))
    ]
    sources: list[Source] = []
    kinds = set()
    for key, number, item in listed:
        content = {"path": item} if isinstance(item, str) else item
        where = f"{key}.{number}"
        if not isinstance(content, dict):
            keys.problems.append(f"{where}: found {item!r}, expected a data set with path and type")
            continue
        row_keys = Keys({name: value for name, value in content.items() if SAME_AS_DEFAULT.get(name) != value})
        row_keys.where = f"{where}."
        documents = key == "pretraining_dataset" or str(content.get("type")).partition(":")[0] in DOCUMENT_TYPES
        kinds.add(documents)
        read = _documents if documents else _rows
        for file in _files(row_keys, where, config, draft):
            source = read(row_keys, file, _unused_name(file, sources), table, draft)
            sources += [source] if source else []
        row_keys.leave(ROW_WITHOUT_EFFECT, ROW_UNSUPPORTED)
        keys.adopt(row_keys)
    if len(kinds) > 1:
        keys.refuse(
            "datasets", "conversations and plain text are not trained on in one loss",
            "the text is in the corpus: set finetune.chat.pretraining_mix.weight to mix it in",
        )  # fmt: skip
    return Data(tuple(sources), kinds == {True})


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _files(keys: Keys, where: str, config: Path, draft: Draft) -> list[Path]:
    """Return the files of a data set; a missing one is a problem, a name on a hub is named as not translated."""
    path, names = keys.text("path") or "", [str(name) for name in _as_list(keys.take("data_files"))]
    if path in LOADERS and names:
        found = {name: find(name, config) for name in names}
        for absent in (name for name, file in found.items() if not file):
            keys.report("data_files", f"found {absent}, but no such file")
        return [file for file in found.values() if file]
    place = find(path, config) if path else None
    if place is None and is_hub_name(path) and path not in LOADERS:
        draft.leave(
            f"{where}.path", path, "a name on a hub pins no bytes",
            f"download it (hf download --repo-type dataset {path}) and set path to the file, or give the file to "
            "bessemer init",
        )  # fmt: skip
        _take_row_keys(keys)
    elif place is None:
        keys.report("path", f"found {path or 'nothing'}, expected a file or a folder; there is none")
    if place is None or place.is_file():
        return [place] if place else []
    files = [place / name for name in names] or sorted(file for file in place.iterdir() if holds_text(file))
    if not files or not all(file.is_file() for file in files):
        keys.report("path", f"found the folder {place}, expected data files in it")
        return []
    return files


def _take_row_keys(keys: Keys) -> None:
    """Count the keys that describe the rows of a data set that is not here as dealt with: its line names them all."""
    for key in keys.content:
        keys.take(key)


def _documents(keys: Keys, file: Path, name: str, table: str, draft: Draft) -> Source | None:
    keys.take("type")
    column = keys.text("field") or keys.text("text_column") or "text"
    if not holds_text(file):
        keys.report("path", f"found {file.name}, expected text, {ROW_KINDS}; convert it")
        return None
    return document_source(name, file, column, draft)


def _rows(keys: Keys, file: Path, name: str, table: str, draft: Draft) -> Source | None:
    """Return the source of a file of conversations or pairs."""
    from tasks.ingest.source_files import UnreadableFile

    if not holds_rows(file):
        keys.report("path", f"found {file.name}, expected {ROW_KINDS}; convert it")
        return None
    try:
        rows = first_rows(file)
    except UnreadableFile as error:
        keys.report("path", str(error))
        return None
    layout = (pair_layout if table == "rankings" else prompt_layout)(keys, rows)
    if layout is None:
        keys.refuse("type", "rows of this type are not read", "write them as messages of role and content (openai)")
        return None
    draft.notes += [note for note in layout.notes if note not in draft.notes]
    return _source(layout, file, name, table)


def _source(layout: Layout, file: Path, name: str, table: str) -> Source:
    """Return a source of one file; columns and tags of its own are written to a dataset_info.json beside it."""
    target = f"{name}/{file.name}"
    if not layout.columns and not layout.tags:
        settings: Mapping[str, Any] = {
            "name": name, "kind": "files", "path": target, "format": layout.format, "table": table
        }  # fmt: skip
        return Source(settings, {target: file})
    info = {
        "file_name": file.name, "formatting": layout.format, "ranking": table == "rankings",
        "columns": layout.columns, "tags": layout.tags,
    }  # fmt: skip
    place = f"{name}/dataset_info.json"
    settings = {"name": name, "kind": "llamafactory", "path": place, "datasets": [name]}
    return Source(settings, {target: file}, {place: json.dumps({name: info}, indent=1) + "\n"})


def _unused_name(file: Path, sources: list[Source]) -> str:
    """Return a name for the source of a file that no other source has."""
    base = re.sub(r"[^\w.-]+", "-", file.stem) or "data"
    used = {str(source.settings["name"]) for source in sources} | {"statements", "prose"}
    return next(
        name for number in range(1, len(used) + 2) if (name := base if number == 1 else f"{base}-{number}") not in used
    )
