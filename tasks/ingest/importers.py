"""Importers of other tools' conversations and preferences: alpaca, ShareGPT, LLaMA-Factory, OpenAI.

Each row is converted to a row of the instructions or rankings table, or rejected with a ValueError: content that is not
text (tool calls, images) is never dropped silently. The formats are those of LLaMA-Factory's `data/README.md`
(https://github.com/hiyouga/LLaMA-Factory) and of OpenAI's fine-tuning guide. `preferences.py` and `annotations.py` read
files that contain rankings only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.ingest import annotations, preferences, ranked_answers
from tasks.ingest.columns import find
from tasks.ingest.turns import (
    REASONING_FIELDS,
    REMEDY,
    Messages,
    Reasoning,
    Row,
    add_reasoning,
    as_text,
    make_pair,
    make_turn,
    parse_message,
    require_messages,
    require_text,
)

CHAT_FORMATS = ("alpaca", "sharegpt", "openai")
RANKING_FORMATS = ("preference", "answers", "argilla", "label_studio")  # formats of rankings only
FORMAT_TABLES: dict[str, tuple[str, ...]] = {  # the tables that a format may be read into
    **dict.fromkeys(CHAT_FORMATS, ("instructions", "rankings")),
    **dict.fromkeys(RANKING_FORMATS, ("rankings",)),
}
ALPACA_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
SHAREGPT_COLUMNS = {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"}
OPENAI_COLUMNS = {"messages": "messages"}
OPENAI_REPLIES = ("preferred_output", "non_preferred_output")
COLUMNS: dict[str, dict[str, str]] = {"alpaca": ALPACA_COLUMNS, "sharegpt": SHAREGPT_COLUMNS, "openai": OPENAI_COLUMNS}
# Columns of LLaMA-Factory that a text chat cannot represent; a row with a value in one is rejected.
UNSUPPORTED_COLUMNS = {name: name for name in ("tools", "images", "videos", "audios", "kto_tag")}
SHAREGPT_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
    "observation_tag": "observation", "function_tag": "function_call",
}  # fmt: skip
ENTRY_KEYS = ("file_name", "formatting", "ranking", "columns", "tags")
HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


@dataclass(frozen=True)
class Layout:
    """The format, columns and tags of a file; `columns` and `tags` are as in `dataset_info.json`."""

    format: str
    table: str
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    reasoning: Reasoning = "reject"

    def convert(self, row: Row) -> Row:
        """Return the row as a row of the table; raise ValueError with the reason if that is not possible."""
        if self.format == "preference":
            return preferences.convert(row, self.reasoning)
        if self.format == "answers":
            return ranked_answers.convert(row, self.reasoning)
        if self.format in ANNOTATION_CONVERTERS:
            return ANNOTATION_CONVERTERS[self.format](row)
        columns = {**COLUMNS[self.format], **UNSUPPORTED_COLUMNS, **self.columns}
        values = {name: find(row, column) for name, column in columns.items()}
        filled = [columns[name] for name in UNSUPPORTED_COLUMNS if values[name] not in (None, "", [])]
        if filled:
            raise ValueError(f"{', '.join(filled)} cannot be represented in a text chat")
        if self.format == "openai":
            return self._convert_openai(row, values)
        pair = ("chosen", "rejected") if self.table == "rankings" else ()
        required = ("prompt", *(pair or ("response",))) if self.format == "alpaca" else ("messages", *pair)
        missing = [columns[name] for name in required if values[name] is None]
        if missing:
            expected = ", ".join(columns[name] for name in required)
            raise ValueError(f"{', '.join(missing)} missing; expected {expected}")
        if self.format == "alpaca":
            return self._convert_alpaca(row, values)
        return self._convert_sharegpt(values)

    def _convert_alpaca(self, row: Row, values: Row) -> Row:
        given = [name for name in ("prompt", "query") if values[name] not in (None, "")]
        question = "\n".join(as_text(values[name], {**ALPACA_COLUMNS, **self.columns}[name]) for name in given)
        turns: Messages = _system_turns(values["system"])
        for pair in values["history"] or []:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"history must be pairs of a question and an answer, found {pair!r}")
            turns += make_turn("user", pair[0]) + make_turn("assistant", pair[1])
        turns += make_turn("user", question)
        if self.table == "rankings":
            return make_pair(turns, values["chosen"], values["rejected"])
        thoughts = [require_text(row[name], name) for name in REASONING_FIELDS if row.get(name)]
        response = as_text(values["response"], "content")  # labels are often numbers or truth values
        return {"messages": turns + make_turn("assistant", add_reasoning(response, thoughts, self.reasoning))}

    def _convert_sharegpt(self, values: Row) -> Row:
        turns: Messages = _system_turns(values["system"])
        for message in require_messages(values["messages"], "conversations"):
            turns += self._parse_tagged_message(message)
        if self.table == "rankings":
            replies = (
                self._parse_tagged_message(values[name], allow_empty=True)[0]["content"]
                for name in ("chosen", "rejected")
            )
            return make_pair(turns, *replies)
        return {"messages": turns}

    def _parse_tagged_message(self, message: Any, allow_empty: bool = False) -> Messages:
        tags = {**SHAREGPT_TAGS, **self.tags}
        roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "system")}
        role, content = tags["role_tag"], tags["content_tag"]
        if not isinstance(message, Mapping) or not {role, content} <= set(message):
            raise ValueError(f"each message needs {role} and {content}, found {message!r:.200}")
        if message[role] in (tags["observation_tag"], tags["function_tag"]):
            raise ValueError(f"a tool's turn ({message[role]}) cannot be represented in a text chat; {REMEDY}")
        if message[role] not in roles:
            raise ValueError(f"expected a role of {', '.join(roles)}, found {message[role]!r}")
        plain = {**message, "role": roles[message[role]], "content": message[content]}
        return parse_message(plain, self.reasoning, allow_empty)

    def _convert_openai(self, row: Row, values: Row) -> Row:
        """Return a chat, or for the table rankings (`input`, `preferred_output`, `non_preferred_output`) a pair."""
        if row.get("functions"):
            raise ValueError("functions cannot be represented in a text chat")
        if self.table == "instructions":
            if values["messages"] is None:
                raise ValueError("messages missing; expected messages")
            return {"messages": self._parse_messages(values["messages"], "messages")}
        missing = [name for name in ("input", *OPENAI_REPLIES) if row.get(name) is None]
        if missing or not isinstance(row["input"], Mapping):
            absent = ", ".join(missing) or "messages of input"
            raise ValueError(f"{absent} missing; expected input, preferred_output, non_preferred_output")
        turns = self._parse_messages(row["input"].get("messages"), "input")
        return make_pair(turns, *(self._parse_reply(row[name], name) for name in OPENAI_REPLIES))

    def _parse_reply(self, value: Any, name: str) -> str:
        messages = require_messages(value, name)
        if len(messages) > 1:
            raise ValueError(f"{name} must be one message, found {len(messages)}")
        return str(parse_message(messages[0], self.reasoning, allow_empty=True)[0]["content"])

    def _parse_messages(self, value: Any, name: str) -> Messages:
        messages = require_messages(value, name)
        return [turn for message in messages for turn in parse_message(message, self.reasoning)]


ANNOTATION_CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "argilla": annotations.convert_argilla,
    "label_studio": annotations.convert_label_studio,
}


def _system_turns(content: Any) -> Messages:
    return make_turn("system", content) if content else []


@dataclass(frozen=True)
class DatasetEntry:
    """A data set of a `dataset_info.json`."""

    path: Path
    layout: Layout


def read_dataset_info(path: Path, names: Sequence[str], within: Path) -> list[DatasetEntry]:
    """Return the data sets with these names; raise ValueError if one is unknown, not pinned, or outside `within`."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"expected LLaMA-Factory's dataset_info.json at {path}: {error}") from error
    if not isinstance(listed, dict):
        raise ValueError(f"expected an object of data sets in {path}, found {type(listed).__name__}")
    unknown = [name for name in names if name not in listed]
    if unknown:
        raise ValueError(f"{path} has no data set {', '.join(unknown)}; it has {', '.join(listed) or 'none'}")
    return [_parse_entry(name, listed[name], path, within) for name in names]


def _parse_entry(name: str, entry: Any, path: Path, within: Path) -> DatasetEntry:
    if not isinstance(entry, dict):
        raise ValueError(f"data set {name}: expected an object, found {entry!r}")
    hub_keys = [key for key in HUB_KEYS if key in entry]
    if hub_keys:
        raise ValueError(
            f"data set {name} names {hub_keys[0]}, which pins no bytes: put its file beside {path.name} and give "
            "file_name, or list it as a source of kind dataset with the commit as its revision"
        )
    unknown = sorted(set(entry) - set(ENTRY_KEYS))
    if unknown:
        raise ValueError(f"data set {name}: {', '.join(unknown)} is not supported; expected {', '.join(ENTRY_KEYS)}")
    kind = entry.get("formatting", "alpaca")
    if kind not in CHAT_FORMATS:
        raise ValueError(f"data set {name}: expected a formatting of {', '.join(CHAT_FORMATS)}, found {kind!r}")
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    for mapping in (columns, tags):
        if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
            raise ValueError(f"data set {name}: columns and tags must map names to names, found {mapping!r}")
    known_columns = {*COLUMNS[kind], *UNSUPPORTED_COLUMNS}
    unknown = sorted(set(columns) - known_columns) + sorted(set(tags) - set(SHAREGPT_TAGS))
    if unknown:
        known = ", ".join(sorted({*known_columns, *SHAREGPT_TAGS}))
        raise ValueError(f"data set {name}: unknown column or tag {', '.join(unknown)}; expected one of {known}")
    file = path.parent / str(entry.get("file_name"))
    if not file.is_file() or not file.resolve().is_relative_to(within.resolve()):
        raise ValueError(f"data set {name}: expected a file_name of a file under {within}, found {file}")
    return DatasetEntry(file, Layout(kind, "rankings" if entry.get("ranking") else "instructions", columns, tags))
