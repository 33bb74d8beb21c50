"""Changes to rows before they are checked: personal data is marked, and what no answer follows is removed.

Both are recorded by position, counted and listed in the report. A conversation that ends with a message of the user
loses that message: nothing is learnt from it, because the loss is on answers. An empty system message says nothing
either. Everything else that is wrong with a row rejects it.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.validate import personal
from tasks.validate.checks import Row
from tasks.validate.personal import Personal

Message = Mapping[str, Any]


@dataclass
class Changes:
    """What was changed in a row."""

    marks: Counter[str] = field(default_factory=Counter)  # number of marked spans by kind of personal data
    removed: list[str] = field(default_factory=list)  # roles of removed messages

    def __bool__(self) -> bool:
        return bool(self.marks or self.removed)


def prepare_row(table: str, row: Row, settings: Personal | None, code: Collection[str], changes: Changes) -> Row:
    """Return a row as it is checked and kept, its id unchanged, and add what was changed to `changes`.

    Personal data stays in rows of the sources or groups in `code`.
    """
    if table == "instructions":
        row = remove_unanswered(row, changes)
    if settings is None or is_code(row, code):
        return row
    return _mark_row(table, row, settings, changes.marks)


def is_code(row: Row, code: Collection[str]) -> bool:
    """Return whether a row's source or group is declared to be code or commands."""
    return row["source"] in code or row.get("group") in code


def remove_unanswered(row: Row, changes: Changes) -> Row:
    """Return a conversation without an empty system message, and without messages of the user after the last answer.

    A conversation without any answer stays as it is; it is rejected.
    """
    messages: list[Message | None] = list(row["messages"] or [])
    first = messages[0] if messages else None
    if first and first["role"] == "system" and not (first["content"] or "").strip():
        changes.removed.append("system")
        messages = messages[1:]
    answers = [number for number, message in enumerate(messages) if message and message["role"] == "assistant"]
    rest = messages[answers[-1] + 1 :] if answers else []
    if all(message and message["role"] == "user" for message in rest):
        changes.removed += ["user"] * len(rest)
        messages = messages[: len(messages) - len(rest)]
    return {**row, "messages": messages} if changes.removed else row


def _mark_row(table: str, row: Row, settings: Personal, found: Counter[str]) -> Row:
    def mark_text(text: str | None) -> str | None:
        return personal.mark_text(text, settings, found) if text else text

    def mark_turns(messages: Sequence[Message | None] | None) -> list[Any] | None:
        if messages is None:
            return None
        return [turn and {**turn, "content": mark_text(turn["content"])} for turn in messages]

    if table == "corpus":
        return {**row, "text": mark_text(row["text"])}
    if table == "instructions":
        # The reply contains the answer, so its marks are counted there.
        answer = row["answer"] and personal.mark_text(row["answer"], settings, Counter())
        return {**row, "answer": answer, "messages": mark_turns(row["messages"])}
    responses = None if row["responses"] is None else [mark_text(response) for response in row["responses"]]
    return {**row, "prompt": mark_turns(row["prompt"]), "responses": responses}
