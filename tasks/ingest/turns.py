"""Turns of a chat, read from other tools' files: text only, known roles, no empty answer.

The importers share these functions. Each raises ValueError with the reason if a row cannot be represented as a chat.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]
Reasoning = Literal["reject", "keep", "drop"]
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thoughts")
TOOL_FIELDS = ("tool_calls", "function_call", "refusal", "audio")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = {"thinking": "thinking", "reasoning": "text"}  # type of a part of a content: its field with the text
PART_NAMES = {
    "image": "an image", "image_url": "an image", "input_image": "an image", "audio": "a sound",
    "input_audio": "a sound", "video": "a video", "file": "a file", "tool_use": "a tool call",
    "tool_result": "a tool’s result",
}  # fmt: skip
REMEDY = "remove the row, or write this part of it as text"


def parse_message(message: Any, reasoning: Reasoning = "reject", allow_empty: bool = False) -> Messages:
    """Return a message with `role` and `content` (OpenAI's and Hugging Face's form) as a list of one turn."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"each message needs role and content, found {message!r:.200}")
    unsupported = [name for name in TOOL_FIELDS if message.get(name)]
    if unsupported or message["role"] in ("tool", "function"):
        found = ", ".join(unsupported) or "a tool’s turn"
        raise ValueError(f"{found} cannot be represented in a text chat; {REMEDY}")
    if message["role"] not in ("system", "developer", "user", "assistant"):
        raise ValueError(f"expected a role of system, developer, user, assistant, found {message['role']!r}")
    if message.get("weight") not in (None, 1) or message.get("train") is False:
        found = "train: false" if message.get("train") is False else f"weight {message['weight']!r}"
        raise ValueError(f"a reply of {found}: every reply of a chat is trained on; expected none without training")
    content, thoughts = _join_parts(message.get("content"))
    thoughts += [require_text(message[name], name) for name in REASONING_FIELDS if message.get(name)]
    content = add_reasoning(content, thoughts, reasoning)
    return make_turn("system" if message["role"] == "developer" else message["role"], content, allow_empty)


def _join_parts(content: Any) -> tuple[Any, list[str]]:
    """Return the text of a content that is a list of parts, and its parts with reasoning."""
    if not isinstance(content, list):
        return content, []
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXT_PARTS:
            texts.append(require_text(part.get("text"), "text"))
        elif kind in REASONING_PARTS:
            thoughts.append(require_text(part.get(REASONING_PARTS[kind]), kind))
        else:
            found = f"{PART_NAMES.get(str(kind), 'a part')} (type {kind})" if kind else f"{part!r:.80}"
            raise ValueError(f"only parts of type text can be represented in a text chat, found {found}; {REMEDY}")
    return "".join(texts), thoughts


def add_reasoning(content: Any, thoughts: Sequence[str], reasoning: Reasoning) -> Any:
    """Return a reply with its reasoning before it, or without it, as the source's setting says.

    Reasoning is not part of `content`, so it would be lost silently if nothing were said about it.
    """
    if not thoughts or reasoning == "drop":
        return content
    if reasoning == "reject":
        raise ValueError(
            "the reply has reasoning beside its content; set `reasoning: keep` for this source to train on it as "
            "<think>...</think> before the reply, or `reasoning: drop` to leave it out"
        )
    thought = "\n".join(text.strip() for text in thoughts)
    return f"<think>\n{thought}\n</think>\n\n{require_text(content, 'content')}"


def make_pair(prompt: Messages, chosen: Any, rejected: Any) -> Row:
    """Return a ranking of two replies to a prompt, the chosen one first. The rejected one may be empty."""
    replies = [
        make_turn("assistant", reply, allow_empty)[0]["content"]
        for reply, allow_empty in ((chosen, False), (rejected, True))
    ]
    return {"prompt": prompt, "responses": replies, "ranks": [1, 2]}


def make_turn(role: str, content: Any, allow_empty: bool = False) -> Messages:
    """Return a list of one turn; raise ValueError if it is empty."""
    checked = require_text(content, "content")
    if not checked.strip() and not allow_empty:
        raise ValueError("an empty answer" if role == "assistant" else f"an empty turn of the {role}")
    return [{"role": role, "content": checked}]


def as_text(value: Any, name: str) -> str:
    """Return a text unchanged, and a number or a truth value as JSON writes it (0 and false are not empty)."""
    return json.dumps(value) if isinstance(value, int | float) else require_text(value, name)


def require_messages(value: Any, name: str) -> Sequence[Any]:
    """Return a list of messages unchanged; raise ValueError if the value is not a list or empty."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of messages, found {value!r:.80}")
    return value


def require_text(value: Any, name: str) -> str:
    """Return a text unchanged; raise ValueError if the value is not one."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, found {value!r:.80}")
    return value
