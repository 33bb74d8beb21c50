"""Rows that come from outside (files, datasets, rankings) are checked and brought into the tables' form.

Every function returns a finished row or raises ValueError with the reason, which is kept beside the refused row.
"""

import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tasks.common import draw
from tasks.common.sources.reading import Reading

REQUIRED = {
    "corpus": {"text"},
    "instructions": {"messages"},
    "rankings": {"prompt", "responses"},
    "facts": {"kind", "entity", "relation", "value"},
    "ratings": {"text", "ratings"},
}
OPTIONAL = {
    "corpus": set[str](),
    "instructions": {"entity", "answer", "tone", "split"},
    "rankings": {"ranks", "scores", "scale", "annotators", "annotator", "models"},
    "facts": set[str](),
    "ratings": {"prompt"},
}
DEFAULT_PROMPT = "Write a sentence."
T = TypeVar("T")


def read_of(table: str) -> set[str]:
    """Return the names of the columns that are read of a table's rows."""
    return REQUIRED[table] | OPTIONAL[table]


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
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"ratings must be numbers with spaces between them, found {found!r}") from error
    if not scores:
        raise ValueError("ratings must hold at least one number")
    prompt = _text_or_none(row, "prompt") or DEFAULT_PROMPT
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
        "entity": _text_or_none(row, "entity") or asked,
        "answer": _text_or_none(row, "answer"),
        "tone": _text_or_none(row, "tone"),
        "source": reading.source,
        "split": where,
    }
    _keep("instructions", kept, reading)


def _rankings(row: Mapping[str, Any], reading: Reading) -> None:
    prompt = row["prompt"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = _messages(asked, "prompt")
    responses = _list(row["responses"], "responses", _string)
    ranks, scores = row.get("ranks"), row.get("scores")
    if (ranks is None) == (scores is None):
        raise ValueError("exactly one of ranks and scores must be given")
    if scores is not None and row.get("scale") is None:
        raise ValueError("scores need the scale's two ends (scale: [low, high])")
    scores = None if scores is None else _list(scores, "scores", _raters)
    raters = max([1, *map(len, scores or ())])
    scale, models, annotator = row.get("scale"), row.get("models"), _annotator(row, reading.source)
    annotators = _whole(row.get("annotators") or raters, "annotators")
    if annotator and max(annotators, raters) > 1:
        raise ValueError(f"annotator names one person, but {max(annotators, raters)} judged; give each a row")
    turns = [text for message in messages for text in (message["role"], message["content"])]
    people = [annotator] if annotator else []
    kept = {
        "id": draw.short_id("rankings", *turns, *responses, repr(ranks), repr(scores), *people),
        "prompt": messages,
        "responses": responses,
        "ranks": None if ranks is None else _list(ranks, "ranks", _whole),
        "scores": scores,
        "scale": None if scale is None else _numbers(scale, "scale"),
        "annotators": annotators,
        "annotator": annotator,
        "models": [] if models is None else _list(models, "models", _string),
        "source": reading.source,
        "split": None,
    }
    _keep("rankings", kept, reading)


def _annotator(row: Mapping[str, Any], source: str) -> str | None:
    """Return a pseudonym of who judged: names and addresses stay out of the table, and differ from source to source."""
    told = row.get("annotator")
    if told is None or told == "":
        return None
    if isinstance(told, bool) or not isinstance(told, int | str):
        raise ValueError(f"annotator must be a name or a number, found {reprlib.repr(told)}")
    return draw.short_id("annotator", source, _string(str(told), "annotator"))


def _keep(table: str, row: dict[str, Any], reading: Reading) -> None:
    reading.read += 1
    reading.rows.setdefault(table, []).append(row)


def _text(row: Mapping[str, Any], column: str) -> str:
    return re.sub(r"^\ufeff", "", _string(row[column], column)).strip()


def _text_or_none(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    return None if value is None else _string(value, column)


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} must be text, found {reprlib.repr(value)}")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{column} holds half a character (a lone surrogate), which no table can store")
    return value


def _whole(value: Any, column: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{column} must be whole numbers from 0 to {2**31 - 1}, found {reprlib.repr(value)}")
    return value


def _number(value: Any, column: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) >= 10**9:
        raise ValueError(f"{column} must be numbers of less than ten digits, found {reprlib.repr(value)}")
    return float(value)


def _numbers(value: Any, column: str) -> list[float]:
    return _list(value, column, _number)


def _raters(value: Any, column: str) -> list[float]:
    """Return what each rater gave a response; where there is one rater, a plain number will do."""
    return _numbers(value, column) if isinstance(value, list) else [_number(value, column)]


def _list(value: Any, column: str, item: Callable[[Any, str], T]) -> list[T]:
    if not isinstance(value, list):
        raise ValueError(f"{column} must be a list, found {reprlib.repr(value)}")
    return [item(each, column) for each in value]


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a list of messages, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"each of {column} needs role and content, found {message!r}")
    return [{part: _string(message[part], f"{part} of {column}") for part in ("role", "content")} for message in value]


ADD: dict[str, Callable[[Mapping[str, Any], Reading], None]] = {
    "corpus": _corpus,
    "instructions": _instructions,
    "rankings": _rankings,
    "facts": _facts,
    "ratings": _ratings,
}
