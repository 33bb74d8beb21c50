"""Turns of a chat as other tools' files tell them, checked: text alone, no empty answer, no role that is none here.

What the importers share; each function raises ValueError with the reason why a row cannot be told as a chat.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]


def said(message: Any) -> Messages:
    """Return one message of `role` and `content` (OpenAI's, Hugging Face's) as a turn."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"each message needs role and content, found {message!r}")
    calls = [name for name in ("tool_calls", "function_call", "refusal", "audio") if message.get(name)]
    if calls or message["role"] in ("tool", "function"):
        raise ValueError(f"{', '.join(calls) or 'a tool’s turn'} cannot be told in a chat of text")
    if message["role"] not in ("system", "developer", "user", "assistant"):
        raise ValueError(f"expected a role of system, developer, user, assistant, found {message['role']!r}")
    if message.get("weight") not in (None, 1):
        raise ValueError(
            f"a reply of weight {message['weight']!r}: no reply of a chat can be left out of learning here"
        )
    content = message.get("content")
    if isinstance(content, list):
        odd = [part for part in content if not isinstance(part, Mapping) or part.get("type") != "text"]
        if odd:
            raise ValueError(f"only parts of type text can be told in a chat of text, found {odd[0]!r}")
        content = "".join(text(part.get("text"), "text") for part in content)
    return turn("system" if message["role"] == "developer" else message["role"], content)


def preference(prompt: Messages, chosen: Any, rejected: Any) -> Row:
    """Return two replies to a prompt, the first of which was preferred, as a ranking."""
    replies = [turn("assistant", reply)[0]["content"] for reply in (chosen, rejected)]
    return {"prompt": prompt, "responses": replies, "ranks": [1, 2]}


def turn(role: str, content: Any) -> Messages:
    """Return one turn; an empty one is none."""
    told = text(content, "content")
    if not told.strip():
        raise ValueError("an empty answer" if role == "assistant" else f"an empty turn of the {role}")
    return [{"role": role, "content": told}]


def messages(value: Any, name: str) -> Sequence[Any]:
    """Return a list of messages as it is."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of messages, found {value!r:.80}")
    return value


def text(value: Any, name: str) -> str:
    """Return a text as it is."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, found {value!r:.80}")
    return value
