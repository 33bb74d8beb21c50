"""How rows of axolotl's prompt types become conversations and pairs: columns and tags as in LLaMA-Factory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.start.translation.keys import Keys

Row = Mapping[str, Any]
NO_COLUMN = ""  # the name of a column that no file has
ALPACA_TYPES: dict[str, dict[str, str]] = {
    "alpaca": {},
    "alpaca_chat.load": {},
    "alpaca_chat.load_concise": {},
    "alpaca_chat.load_no_prompt": {},
    "alpaca_instruct.load": {},
    "alpaca_w_system.load": {},
    "alpaca_chat.load_qa": {"prompt": "question", "query": NO_COLUMN, "response": "answer"},
    "alpaca_chat.load_camel_ai": {"prompt": "message_1", "query": NO_COLUMN, "response": "message_2"},
    "gpteacher": {"response": "response"},
    "oasst": {"prompt": "INSTRUCTION", "query": NO_COLUMN, "response": "RESPONSE"},
    "summarizetldr": {"prompt": "article", "query": NO_COLUMN, "response": "summary"},
}  # fmt: skip
PAIR_TYPES: dict[str, dict[str, str]] = {  # of chatml.TYPE, llama3.TYPE and zephyr.TYPE, whose sides are texts
    "intel": {"prompt": "question", "query": NO_COLUMN},
    "icr": {"prompt": "input", "query": NO_COLUMN},
    "prompt_pairs": {"prompt": "prompt", "query": NO_COLUMN},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
}
MESSAGE_PAIR_TYPES = ("ultra", "argilla_chat")  # whose sides are lists of messages
PROMPT_COLUMNS = ("prompt", "input", "question", "instruction")
ALPACA_NOTE = (
    "The type alpaca puts its own wording around an instruction; here the chat template of the checkpoint does."
)
ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    **{f"{target}_tag": name for target, name in ROLES.items()},
}
SHAREGPT_TAGS = {
    "role_tag": "from", "content_tag": "value", **{f"{target}_tag": name for target, name in SHAREGPT_ROLES.items()}
}  # fmt: skip
DEFAULT_ROLES = {"user": ["human", "user"], "assistant": ["gpt", "assistant"], "system": ["system"]}


@dataclass(frozen=True)
class Layout:
    """The format of a file's rows, with the columns and tags that differ from the format's own."""

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def prompt_layout(keys: Keys, rows: Sequence[Row]) -> Layout | None:
    """Return the layout of conversations; None for a type that is not read."""
    kind = keys.take("type")
    if isinstance(kind, dict):
        return _own_prompt(Keys(kind, f"{keys.where}type."), keys)
    name = str(kind)
    base = name.partition(":")[0]
    if base in ALPACA_TYPES:
        return Layout("alpaca", ALPACA_TYPES[base], notes=(ALPACA_NOTE,))
    if base.partition(".")[0] not in ("chat_template", "sharegpt"):
        return None
    return _message_layout(keys, rows, "conversations" if base.startswith("sharegpt") else "messages")


def _own_prompt(fields: Keys, keys: Keys) -> Layout:
    """Return the layout of a prompt type that the user defines by the names of its columns."""
    names = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    keyed = {
        "prompt": "field_instruction",
        "query": "field_input",
        "response": "field_output",
        "system": "field_system",
    }
    columns = {
        name: column for name, key in keyed.items() if (column := fields.text(key, names[name]) or "") != names[name]
    }
    _leave_formats(fields, keys)
    return Layout("alpaca", columns)


def _leave_formats(fields: Keys, keys: Keys) -> None:
    """Name what else a user's own type sets as not translated, in the keys of its data set."""
    why = ("the chat template of the checkpoint words a prompt", "write the wording into the file")
    formats = ("format", "no_input_format", "prompt_format", "chosen_format", "rejected_format", "system_prompt")
    fields.leave((), dict.fromkeys((*formats, "system_format"), why))
    keys.adopt(fields)


def _message_layout(keys: Keys, rows: Sequence[Row], default: str, **pair: str) -> Layout:
    """Return the layout of rows with a list of messages, and of a pair's two replies."""
    column, role, content = _message_fields(keys, default)
    names, notes = _role_names(keys, rows, column, role)
    tags = {"role_tag": role, "content_tag": content, **{f"{target}_tag": name for target, name in names.items()}}
    if not pair and column == "messages" and tags == OPENAI_TAGS:
        return Layout("openai", notes=notes)
    columns = {**({} if column == "conversations" else {"messages": column}), **pair}
    return Layout("sharegpt", columns, {name: tag for name, tag in tags.items() if tag != SHAREGPT_TAGS[name]}, notes)


def _message_fields(keys: Keys, default: str) -> tuple[str, str, str]:
    """Return the names of the column of messages, and of role and content within a message."""
    mappings = keys.mapping("message_property_mappings")
    older = ("from", "value") if default == "conversations" else ("role", "content")
    role = keys.text("message_field_role") or mappings.get("role") or older[0]
    content = keys.text("message_field_content") or mappings.get("content") or older[1]
    return keys.text("field_messages", default) or default, str(role), str(content)


def _role_names(keys: Keys, rows: Sequence[Row], column: str, role: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the names of the roles in the rows, and a note of the names that are left out: a role has one name."""
    messages = [message for row in rows if isinstance(row.get(column), list) for message in row[column]]
    found = {str(message.get(role)) for message in messages if isinstance(message, Mapping)}
    aliases = keys.mapping("roles") or DEFAULT_ROLES
    names, others = {}, set()
    for target, usual in (ROLES if role == "role" else SHAREGPT_ROLES).items():
        known = aliases.get(target, usual)
        used = [str(name) for name in (known if isinstance(known, list) else [known]) if str(name) in found] or [usual]
        names[target] = used[0]
        others |= set(used[1:])
    note = f"Turns of the roles {', '.join(sorted(others))} are rejected: give each role one name in the file."
    return names, (note,) if others else ()


def pair_layout(keys: Keys, rows: Sequence[Row]) -> Layout | None:
    """Return the layout of preference pairs; None for a type that is not read."""
    kind = keys.take("type")
    if isinstance(kind, dict):
        return _own_pair(Keys(kind, f"{keys.where}type."), keys)
    family, _, variant = str(kind or "").partition(".")
    row = rows[0] if rows else {}
    if family == "bradley_terry":
        return Layout("alpaca", PAIR_TYPES["icr"])
    if variant in MESSAGE_PAIR_TYPES or (family == "chat_template" and variant.startswith("argilla")):
        return Layout("preference")
    if variant in PAIR_TYPES:
        return Layout("alpaca", PAIR_TYPES[variant])
    if family == "chat_template":
        return _template_pair(keys, rows, row)
    if family in ("chatml", "llama3", "zephyr", "") and isinstance(row.get("chosen"), str):
        prompt = next((name for name in PROMPT_COLUMNS if name in row), "prompt")
        return Layout("alpaca", {"prompt": prompt, "query": NO_COLUMN})
    return Layout("preference") if not kind and {"chosen", "rejected"} <= set(row) else None


def _own_pair(fields: Keys, keys: Keys) -> Layout:
    keyed = {"prompt": "field_prompt", "chosen": "field_chosen", "rejected": "field_rejected", "system": "field_system"}
    columns = {name: fields.text(key, name) or name for name, key in keyed.items()}
    _leave_formats(fields, keys)
    return Layout("alpaca", {**columns, "query": NO_COLUMN})


def _template_pair(keys: Keys, rows: Sequence[Row], row: Row) -> Layout | None:
    """Return the layout of messages with a chosen and a rejected reply."""
    chosen, rejected = keys.text("field_chosen", "chosen"), keys.text("field_rejected", "rejected")
    if isinstance(row.get(str(chosen)), Mapping):
        return _message_layout(keys, rows, "messages", chosen=str(chosen), rejected=str(rejected))
    _message_fields(keys, "messages")
    keys.take("roles")
    if (chosen, rejected) == ("chosen", "rejected"):
        return Layout("preference")
    return None
