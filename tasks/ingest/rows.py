"""Checks the rows of files, datasets and rankings, and converts them to rows of the tables.

Every function raises ValueError with the reason if a row is invalid; the reason is stored with the rejected row.
"""

import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tasks.common import stable_hash
from tasks.ingest.reading import Reading

REQUIRED_COLUMNS = {
    "corpus": {"text"},
    "instructions": {"messages"},
    "rankings": {"prompt", "responses"},
    "facts": {"kind", "entity", "relation", "value"},
    "ratings": {"text", "ratings"},
}
OPTIONAL_COLUMNS = {
    "corpus": set[str](),
    "instructions": {"entity", "answer", "tone", "split"},
    "rankings": {"ranks", "scores", "scale", "annotators", "annotator", "models"},
    "facts": set[str](),
    "ratings": {"prompt"},
}
DEFAULT_PROMPT = "Write a sentence."
T = TypeVar("T")


def known_columns(table: str) -> set[str]:
    """Return the names of the columns that are read from rows of a table."""
    return REQUIRED_COLUMNS[table] | OPTIONAL_COLUMNS[table]


def add_row(table: str, row: Mapping[str, Any], reading: Reading) -> None:
    """Add a row of a source to its reading; raise ValueError with the reason if it is invalid."""
    missing = sorted(column for column in REQUIRED_COLUMNS[table] if row.get(column) is None)
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; expected {', '.join(sorted(REQUIRED_COLUMNS[table]))}")
    ROW_ADDERS[table](row, reading)


def _add_corpus(row: Mapping[str, Any], reading: Reading) -> None:
    reading.add_prose(_require_text(row, "text"))


def _add_facts(row: Mapping[str, Any], reading: Reading) -> None:
    kind, entity, relation, value = (_require_text(row, column) for column in ("kind", "entity", "relation", "value"))
    if not (kind and entity and relation):
        raise ValueError("kind, entity and relation must not be empty (an empty value leaves the fact out)")
    reading.add_fact(kind, entity, relation, value)


def _add_ratings(row: Mapping[str, Any], reading: Reading) -> None:
    found = row["ratings"]
    values = found.split() if isinstance(found, str) else found
    try:
        scores = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"ratings must be numbers with spaces between them, found {found!r}") from error
    if not scores:
        raise ValueError("ratings must contain at least one number")
    prompt = _optional_text(row, "prompt") or DEFAULT_PROMPT
    reading.add_rated_text(_require_text(row, "text"), scores, prompt, reading.source)


def _add_instructions(row: Mapping[str, Any], reading: Reading) -> None:
    messages = _require_messages(row["messages"], "messages")
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    split = row.get("split")
    if split not in (None, "train", "heldout"):
        raise ValueError(f"split must be train or heldout, found {split!r}; set `format: openai` to ignore this column")
    turns = [text for message in messages for text in (message["role"], message["content"])]
    finished = {
        "id": stable_hash.short_id("instructions", *turns),
        "messages": messages,
        "entity": _optional_text(row, "entity") or question,
        "answer": _optional_text(row, "answer"),
        "tone": _optional_text(row, "tone"),
        "source": reading.source,
        "split": split,
    }
    _add_finished_row("instructions", finished, reading)


def _add_rankings(row: Mapping[str, Any], reading: Reading) -> None:
    prompt = row["prompt"]
    turns_of_prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = _require_messages(turns_of_prompt, "prompt")
    responses = _require_list(row["responses"], "responses", _require_string)
    ranks, scores = row.get("ranks"), row.get("scores")
    if (ranks is None) == (scores is None):
        raise ValueError("exactly one of ranks and scores must be given")
    if scores is not None and row.get("scale") is None:
        raise ValueError("scores need the scale's two ends (scale: [low, high])")
    scores = None if scores is None else _require_list(scores, "scores", _parse_scores)
    raters = max([1, *map(len, scores or ())])
    scale, models, annotator = row.get("scale"), row.get("models"), _pseudonymize_annotator(row, reading.source)
    annotators = _require_whole_number(row.get("annotators") or raters, "annotators")
    if annotator and max(annotators, raters) > 1:
        raise ValueError(f"annotator names one person, but {max(annotators, raters)} judged; give each a row")
    turns = [text for message in messages for text in (message["role"], message["content"])]
    annotator_part = [annotator] if annotator else []
    finished = {
        "id": stable_hash.short_id("rankings", *turns, *responses, repr(ranks), repr(scores), *annotator_part),
        "prompt": messages,
        "responses": responses,
        "ranks": None if ranks is None else _require_list(ranks, "ranks", _require_whole_number),
        "scores": scores,
        "scale": None if scale is None else _require_numbers(scale, "scale"),
        "annotators": annotators,
        "annotator": annotator,
        "models": [] if models is None else _require_list(models, "models", _require_string),
        "source": reading.source,
        "split": None,
    }
    _add_finished_row("rankings", finished, reading)


def _pseudonymize_annotator(row: Mapping[str, Any], source: str) -> str | None:
    """Return a pseudonym of the annotator, so that the table contains no names or addresses.

    The same name in another source gets another pseudonym.
    """
    name = row.get("annotator")
    if name is None or name == "":
        return None
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ValueError(f"annotator must be a name or a number, found {reprlib.repr(name)}")
    return stable_hash.short_id("annotator", source, _require_string(str(name), "annotator"))


def _add_finished_row(table: str, row: dict[str, Any], reading: Reading) -> None:
    reading.rows_read += 1
    reading.rows[table].append(row)


def _require_text(row: Mapping[str, Any], column: str) -> str:
    return re.sub(r"^\ufeff", "", _require_string(row[column], column)).strip()


def _optional_text(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    return None if value is None else _require_string(value, column)


def _require_string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} must be text, found {reprlib.repr(value)}")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{column} contains a lone surrogate (half a character), which no table can store")
    return value


def _require_whole_number(value: Any, column: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{column} must be whole numbers from 0 to {2**31 - 1}, found {reprlib.repr(value)}")
    return value


def _require_number(value: Any, column: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) >= 10**9:
        raise ValueError(f"{column} must be numbers of less than ten digits, found {reprlib.repr(value)}")
    return float(value)


def _require_numbers(value: Any, column: str) -> list[float]:
    return _require_list(value, column, _require_number)


def _parse_scores(value: Any, column: str) -> list[float]:
    """Return the scores of a response, one for each rater; a single number stands for one rater."""
    return _require_numbers(value, column) if isinstance(value, list) else [_require_number(value, column)]


def _require_list(value: Any, column: str, item: Callable[[Any, str], T]) -> list[T]:
    if not isinstance(value, list):
        raise ValueError(f"{column} must be a list, found {reprlib.repr(value)}")
    return [item(each, column) for each in value]


def _require_messages(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a list of messages, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"each of {column} needs role and content, found {message!r}")
    return [
        {part: _require_string(message[part], f"{part} of {column}") for part in ("role", "content")}
        for message in value
    ]


ROW_ADDERS: dict[str, Callable[[Mapping[str, Any], Reading], None]] = {
    "corpus": _add_corpus,
    "instructions": _add_instructions,
    "rankings": _add_rankings,
    "facts": _add_facts,
    "ratings": _add_ratings,
}
