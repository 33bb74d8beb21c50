"""Rows that come from outside (files, datasets, rankings) are checked and brought into the tables' form.

Every function returns a finished row or raises ValueError with the reason, which is kept beside the refused row.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from tasks.common import draw
from tasks.common.reading import Reading

REQUIRED = {
    "corpus": {"text"},
    "instructions": {"messages"},
    "rankings": {"prompt", "responses"},
    "facts": {"kind", "entity", "relation", "value"},
    "ratings": {"text", "ratings"},
}
DEFAULT_PROMPT = "Write a sentence."


def add(table: str, row: Mapping[str, Any], reading: Reading) -> None:
    """Take one row of a source's table into its reading, or raise ValueError with the reason against it."""
    missing = sorted(column for column in REQUIRED[table] if row.get(column) is None)
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; expected {', '.join(sorted(REQUIRED[table]))}")
    ADD[table](row, reading)


def _corpus(row: Mapping[str, Any], reading: Reading) -> None:
    reading.tell(_text(row, "text"))


def _facts(row: Mapping[str, Any], reading: Reading) -> None:
    kind, entity, relation, value = (_text(row, column) for column in ("kind", "entity", "relation", "value"))
    if not (kind and entity and relation):
        raise ValueError("kind, entity and relation must not be empty (an empty value leaves the fact out)")
    reading.fact(kind, entity, relation, value)


def _ratings(row: Mapping[str, Any], reading: Reading) -> None:
    found = row["ratings"]
    values = found.split() if isinstance(found, str) else found
    try:
        scores = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"ratings must be numbers with spaces between them, found {found!r}") from error
    if not scores:
        raise ValueError("ratings must hold at least one number")
    prompt = row.get("prompt") or DEFAULT_PROMPT
    reading.rate(_text(row, "text"), scores, prompt, reading.source)


def _instructions(row: Mapping[str, Any], reading: Reading) -> None:
    messages = _messages(row["messages"], "messages")
    asked = next((message["content"] for message in messages if message["role"] == "user"), "")
    where = row.get("split")
    if where not in (None, "train", "heldout"):
        raise ValueError(f"split must be train or heldout (or left out), found {where!r}")
    turns = [text for message in messages for text in (message["role"], message["content"])]
    kept = {
        "id": draw.short_id("instructions", *turns),
        "messages": messages,
        "entity": row.get("entity") or asked,
        "answer": row.get("answer"),
        "tone": row.get("tone"),
        "source": reading.source,
        "split": where,
    }
    _keep("instructions", kept, reading)


def _rankings(row: Mapping[str, Any], reading: Reading) -> None:
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
    responses = [str(response) for response in row["responses"]]
    ranks, scores = row.get("ranks"), row.get("scores")
    if (ranks is None) == (scores is None):
        raise ValueError("exactly one of ranks and scores must be given")
    if scores is not None and row.get("scale") is None:
        raise ValueError("scores need the scale's two ends (scale: [low, high])")
    turns = [text for message in messages for text in (message["role"], message["content"])]
    kept = {
        "id": draw.short_id("rankings", *turns, *responses, repr(ranks), repr(scores)),
        "prompt": messages,
        "responses": responses,
        "ranks": ranks,
        "scores": scores,
        "scale": row.get("scale"),
        "annotators": row.get("annotators") or 1,
        "models": list(row.get("models") or []),
        "source": reading.source,
        "split": None,
    }
    _keep("rankings", kept, reading)


def _keep(table: str, row: dict[str, Any], reading: Reading) -> None:
    reading.read += 1
    reading.rows.setdefault(table, []).append(row)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column} must be text, found {type(value).__name__}")
    return re.sub(r"^\ufeff", "", value).strip()


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a list of messages, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"each of {column} needs role and content, found {message!r}")
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in value]


ADD: dict[str, Callable[[Mapping[str, Any], Reading], None]] = {
    "corpus": _corpus,
    "instructions": _instructions,
    "rankings": _rankings,
    "facts": _facts,
    "ratings": _ratings,
}
