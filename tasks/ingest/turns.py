"""Turns of a chat, read from other tools' files: text only, known roles, no empty answer.

The importers share these functions. Each raises ValueError with the reason if a row cannot be represented as a chat.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]


def parse_message(message: Any) -> Messages:
    """Return a message with `role` and `content` (OpenAI's and Hugging Face's form) as a list of one turn."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"each message needs role and content, found {message!r}")
    unsupported = [name for name in ("tool_calls", "function_call", "refusal", "audio") if message.get(name)]
    if unsupported or message["role"] in ("tool", "function"):
        raise ValueError(f"{', '.join(unsupported) or 'a tool’s turn'} cannot be represented in a text chat")
    if message["role"] not in ("system", "developer", "user", "assistant"):
        raise ValueError(f"expected a role of system, developer, user, assistant, found {message['role']!r}")
    if message.get("weight") not in (None, 1):
        raise ValueError(f"a reply of weight {message['weight']!r}: every reply of a chat is trained on; expected 1")
    content = message.get("content")
    if isinstance(content, list):
        others = [part for part in content if not isinstance(part, Mapping) or part.get("type") != "text"]
        if others:
            raise ValueError(f"only parts of type text can be represented in a text chat, found {others[0]!r}")
        content = "".join(require_text(part.get("text"), "text") for part in content)
    return make_turn("system" if message["role"] == "developer" else message["role"], content)


def make_pair(prompt: Messages, chosen: Any, rejected: Any) -> Row:
    """Return a ranking of two replies to a prompt, the chosen one first."""
    replies = [make_turn("assistant", reply)[0]["content"] for reply in (chosen, rejected)]
    return {"prompt": prompt, "responses": replies, "ranks": [1, 2]}


def make_turn(role: str, content: Any) -> Messages:
    """Return a list of one turn; raise ValueError if it is empty."""
    checked = require_text(content, "content")
    if not checked.strip():
        raise ValueError("an empty answer" if role == "assistant" else f"an empty turn of the {role}")
    return [{"role": role, "content": checked}]


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
