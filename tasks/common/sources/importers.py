"""Other tools' files of conversations and preferences, row by row: alpaca, ShareGPT, LLaMA-Factory, OpenAI.

Each row becomes a row of the instructions or rankings table, or ValueError says why it cannot: what is not text (tool
calls, images) has no place in a chat here and is never dropped in silence. The formats are those of LLaMA-Factory's
`data/README.md` (https://github.com/hiyouga/LLaMA-Factory) and of OpenAI's fine-tuning guide. Files that hold nothing
but rankings are read by `preferences.py` and `annotations.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.common.sources import annotations, preferences
from tasks.common.sources.turns import Messages, Row, messages, preference, said, text, turn

CHATS = ("alpaca", "sharegpt", "openai")
# What holds rankings and nothing else.
RANKINGS: dict[str, Callable[[Row], Row]] = {
    "preference": preferences.convert,
    "argilla": annotations.argilla,
    "label_studio": annotations.label_studio,
}
FORMATS: dict[str, tuple[str, ...]] = {  # the tables that each can fill
    **dict.fromkeys(CHATS, ("instructions", "rankings")),
    **dict.fromkeys(RANKINGS, ("rankings",)),
}
ALPACA = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
SHAREGPT = {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"}
OPENAI = {"messages": "messages"}
COLUMNS: dict[str, dict[str, str]] = {"alpaca": ALPACA, "sharegpt": SHAREGPT, "openai": OPENAI}
# What LLaMA-Factory knows and a chat of text does not have; a row that fills one is refused.
BEYOND_TEXT = {name: name for name in ("tools", "images", "videos", "audios", "kto_tag")}
TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
    "observation_tag": "observation", "function_tag": "function_call",
}  # fmt: skip
ENTRY = ("file_name", "formatting", "ranking", "columns", "tags")
UNPINNED = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


@dataclass(frozen=True)
class Layout:
    """Where the rows of one file keep what is needed; `columns` and `tags` as in `dataset_info.json`."""

    format: str
    table: str
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def convert(self, row: Row) -> Row:
        """Return a row of the table; raise ValueError with the reason where there is none in it."""
        if self.format in RANKINGS:
            return RANKINGS[self.format](row)
        columns = {**COLUMNS[self.format], **BEYOND_TEXT, **self.columns}
        filled = [columns[name] for name in BEYOND_TEXT if row.get(columns[name]) not in (None, "", [])]
        if filled:
            raise ValueError(f"{', '.join(filled)} cannot be told in a chat of text")
        found = {name: row.get(column) for name, column in columns.items()}
        if self.format == "openai":
            return _openai(row, found, self.table)
        wanted = ("chosen", "rejected") if self.table == "rankings" else ()
        needed = ("prompt", *(wanted or ("response",))) if self.format == "alpaca" else ("messages", *wanted)
        missing = [columns[name] for name in needed if found[name] is None]
        if missing:
            expected = ", ".join(columns[name] for name in needed)
            raise ValueError(f"{', '.join(missing)} missing; expected {expected}")
        return _alpaca(found, self.table) if self.format == "alpaca" else _sharegpt(found, self.table, self.tags)


def _alpaca(found: Row, table: str) -> Row:
    asked = "\n".join(text(found[name], name) for name in ("prompt", "query") if found[name])
    turns: Messages = _system(found["system"])
    for pair in found["history"] or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"history must be pairs of a question and an answer, found {pair!r}")
        turns += turn("user", pair[0]) + turn("assistant", pair[1])
    turns += turn("user", asked)
    if table == "rankings":
        return preference(turns, found["chosen"], found["rejected"])
    return {"messages": turns + turn("assistant", found["response"])}


def _sharegpt(found: Row, table: str, given: Mapping[str, str]) -> Row:
    tags = {**TAGS, **given}
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "system")}
    turns: Messages = _system(found["system"])
    for message in messages(found["messages"], "conversations"):
        turns += _tagged(message, tags, roles)
    if table == "rankings":
        chosen, rejected = (_tagged(found[name], tags, roles)[0]["content"] for name in ("chosen", "rejected"))
        return preference(turns, chosen, rejected)
    return {"messages": turns}


def _tagged(message: Any, tags: Mapping[str, str], roles: Mapping[str, str]) -> Messages:
    role, content = tags["role_tag"], tags["content_tag"]
    if not isinstance(message, Mapping) or not {role, content} <= set(message):
        raise ValueError(f"each message needs {role} and {content}, found {message!r}")
    if message[role] in (tags["observation_tag"], tags["function_tag"]):
        raise ValueError(f"a tool's turn ({message[role]}) cannot be told in a chat of text")
    if message[role] not in roles:
        raise ValueError(f"expected a role of {', '.join(roles)}, found {message[role]!r}")
    return turn(roles[message[role]], message[content])


def _openai(row: Row, found: Row, table: str) -> Row:
    """Return a chat, or (`input`, `preferred_output`, `non_preferred_output`) a preference."""
    if row.get("functions"):
        raise ValueError("functions cannot be told in a chat of text")
    if table == "instructions":
        if found["messages"] is None:
            raise ValueError("messages missing; expected messages")
        return {"messages": [told for message in messages(found["messages"], "messages") for told in said(message)]}
    missing = [name for name in ("input", "preferred_output", "non_preferred_output") if row.get(name) is None]
    if missing or not isinstance(row["input"], Mapping):
        told = ", ".join(missing) or "messages of input"
        raise ValueError(f"{told} missing; expected input, preferred_output, non_preferred_output")
    turns = [told for message in messages(row["input"].get("messages"), "input") for told in said(message)]
    replies = [
        said(messages(row[name], name)[-1])[0]["content"] for name in ("preferred_output", "non_preferred_output")
    ]
    return preference(turns, *replies)


def _system(content: Any) -> Messages:
    return turn("system", content) if content else []


@dataclass(frozen=True)
class Entry:
    """One data set of a `dataset_info.json`."""

    path: Path
    layout: Layout


def dataset_info(path: Path, names: Sequence[str], within: Path) -> list[Entry]:
    """Return the entries of these names; raise ValueError with what is wrong and what could be done."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"expected LLaMA-Factory's dataset_info.json at {path}: {error}") from error
    if not isinstance(listed, dict):
        raise ValueError(f"expected an object of data sets in {path}, found {type(listed).__name__}")
    unknown = [name for name in names if name not in listed]
    if unknown:
        raise ValueError(f"{path} has no data set {', '.join(unknown)}; it has {', '.join(listed) or 'none'}")
    return [_entry(name, listed[name], path, within) for name in names]


def _entry(name: str, given: Any, path: Path, within: Path) -> Entry:
    if not isinstance(given, dict):
        raise ValueError(f"data set {name}: expected an object, found {given!r}")
    away = [key for key in UNPINNED if key in given]
    if away:
        raise ValueError(
            f"data set {name} names {away[0]}, which pins no bytes: put its file beside {path.name} and give "
            "file_name, or list it as a source of kind dataset with the commit as its revision"
        )
    odd = sorted(set(given) - set(ENTRY))
    if odd:
        raise ValueError(f"data set {name}: {', '.join(odd)} cannot be followed here; known are {', '.join(ENTRY)}")
    kind = given.get("formatting", "alpaca")
    if kind not in CHATS:
        raise ValueError(f"data set {name}: expected a formatting of {', '.join(CHATS)}, found {kind!r}")
    columns, tags = given.get("columns", {}), given.get("tags", {})
    for mapping in (columns, tags):
        if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
            raise ValueError(f"data set {name}: expected columns and tags to name columns and tags, found {mapping!r}")
    strange = sorted(set(columns) - {*COLUMNS[kind], *BEYOND_TEXT}) + sorted(set(tags) - set(TAGS))
    if strange:
        known = sorted({*COLUMNS[kind], *BEYOND_TEXT, *TAGS})
        raise ValueError(f"data set {name}: no column or tag is called {', '.join(strange)}; known: {', '.join(known)}")
    file = path.parent / str(given.get("file_name"))
    if not file.is_file() or not file.resolve().is_relative_to(within.resolve()):
        raise ValueError(f"data set {name}: expected a file_name of a file under {within}, found {file}")
    return Entry(file, Layout(kind, "rankings" if given.get("ranking") else "instructions", columns, tags))
