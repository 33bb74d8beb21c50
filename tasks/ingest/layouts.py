"""Which table and format the rows of a file have, by their columns; the columns that each format reads."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from tasks.ingest import ranked_answers, rows
from tasks.ingest.importers import FORMAT_TABLES, Layout
from tasks.ingest.turns import Reasoning, Row, parse_message

OWN = "columns"  # the layout of rows with the columns of the table
LAYOUTS = ("openai", "alpaca", "sharegpt", "preference", "answers", "argilla", "label_studio")
FORMAT_COLUMNS: dict[tuple[str, str], tuple[str, ...]] = {  # by (format, table)
    ("openai", "instructions"): ("messages",),
    ("openai", "rankings"): ("input", "preferred_output", "non_preferred_output"),
    ("alpaca", "instructions"): ("instruction", "input", "output", "history", "system"),
    ("alpaca", "rankings"): ("instruction", "input", "chosen", "rejected", "history", "system"),
    ("sharegpt", "instructions"): ("conversations", "system"),
    ("sharegpt", "rankings"): ("conversations", "chosen", "rejected", "system"),
    ("preference", "rankings"): ("prompt", "chosen", "rejected", "system", "annotator"),
    ("answers", "rankings"): ranked_answers.COLUMNS,
    ("argilla", "rankings"): ("fields", "responses"),
    ("label_studio", "rankings"): ("data", "annotations"),
}
SIMPLE_TABLES = ("corpus", "facts", "ratings")  # no other tool has a format for them
MAY_BE_ABSENT = {
    "input", "history", "system", "annotator", "annotators", "models", "ranks", "scores", "scale", "entity", "answer",
    "tone", "split", "answers", "answer_a", "answer_b", "winner",
}  # fmt: skip
# Columns with a question and a reply, as data sets call them: read as alpaca's instruction and output.
QUESTIONS = ("instruction", "question", "query", "prompt", "input")
REPLIES = ("output", "response", "answer", "completion", "reply", "target")
CONTEXTS = ("input", "context")
# Columns that a CSV file or a database contains as JSON text.
JSON_COLUMNS = (
    "messages", "conversations", "history", "responses", "ranks", "scores", "scale", "models", "answers",
)  # fmt: skip
# Keys that say that a JSON object is a row, not a wrapper around rows.
ROW_KEYS = frozenset(
    {"text", "content", *QUESTIONS, *REPLIES, *CONTEXTS, *(name for names in FORMAT_COLUMNS.values() for name in names)}
    - {"data", "responses"}
)


@dataclass(frozen=True)
class Detected:
    """The table and format of rows, and the columns that have other names in them."""

    table: str
    format: str
    columns: dict[str, str] = field(default_factory=dict)


def known_columns(format: str | None, table: str | None) -> set[str]:
    """Return the names of the columns that a format reads; without one, of all formats that fit the table."""
    pairs = [key for key in FORMAT_COLUMNS if format in (None, key[0]) and table in (None, key[1])]
    known = {name for key in pairs for name in FORMAT_COLUMNS[key]}
    own = [] if format else [table] if table else list(rows.REQUIRED_COLUMNS)
    return known.union(*(rows.known_columns(name) for name in own))


def detect(sample: Row, table: str | None, format: str | None, mapped: Iterable[str]) -> Detected | None:
    """Return how rows like this one are read, or None if no table or format has such columns.

    `sample` has the columns that the source maps already; a format that does not read one of them is not chosen. Names
    may be written in capitals and with spaces, as people write them in spreadsheets.
    """
    names = {_plain(name): str(name) for name in sorted(sample, key=lambda name: _plain(name) == name)}
    for candidate in _candidates({plain: sample[name] for plain, name in names.items()}):
        found = _restore(candidate, names)
        fits = table in (None, found.table) and format in (None, found.format)
        known = known_columns(None if found.format == OWN else found.format, found.table)
        if fits and known.issuperset(mapped):
            return found
    if format:
        return Detected(table or FORMAT_TABLES[format][0], format)
    names_columns = table is not None and rows.REQUIRED_COLUMNS[table] <= set(mapped)
    return Detected(table, OWN) if table in SIMPLE_TABLES or (table and names_columns) else None


def _plain(name: Any) -> str:
    return "_".join(str(name).lower().split())


def _restore(found: Detected, names: Mapping[str, str]) -> Detected:
    """Return the detected columns under the names that they have in the rows; `names` has those by plain names."""
    read = known_columns(None if found.format == OWN else found.format, found.table) - found.columns.keys()
    renamed = {plain: plain for plain in sorted(read & names.keys()) if names[plain] != plain}
    return Detected(
        found.table, found.format, {name: names[plain] for name, plain in (found.columns | renamed).items()}
    )


def _candidates(row: Row) -> Iterator[Detected]:
    """Yield the readings of a row, the most likely one first."""
    names = row.keys()
    if {"data", "annotations"} <= names:
        yield Detected("rankings", "label_studio")
    if {"fields", "responses"} <= names or any(str(name).endswith(".responses") for name in names):
        yield Detected("rankings", "argilla")
    yield from _pair_candidates(row)
    if {"prompt", "responses"} <= names:
        yield Detected("rankings", OWN)
    yield from _chat_candidates(row)
    if {"kind", "entity", "relation", "value"} <= names:
        yield Detected("facts", OWN)
    if {"text", "ratings"} <= names:
        yield Detected("ratings", OWN)
    yield from _question_candidates(row)
    if "text" in names:
        yield Detected("corpus", OWN)


def _pair_candidates(row: Row) -> Iterator[Detected]:
    names = row.keys()
    if {"chosen", "rejected"} <= names:
        is_reply = isinstance(_decode_cell(row["chosen"]), str)  # else a conversation, which contains the prompt
        if "conversations" in names:
            yield Detected("rankings", "sharegpt")
        elif "instruction" in names and is_reply:
            yield Detected("rankings", "alpaca")
        prompt = next((name for name in ("prompt", *QUESTIONS) if name in row), "prompt") if is_reply else "prompt"
        yield Detected("rankings", "preference", {} if prompt == "prompt" else {"prompt": prompt})
    decoded = {name: _decode_cell(row[name]) for name in row.keys() & ranked_answers.LISTS}
    for columns in ranked_answers.renamed_columns({**row, **decoded}, ("prompt", *QUESTIONS)):
        yield Detected("rankings", "answers", {name: found for name, found in columns.items() if name != found})
    if {"input", "preferred_output", "non_preferred_output"} <= names:
        yield Detected("rankings", "openai")


def _chat_candidates(row: Row) -> Iterator[Detected]:
    for name in ("messages", "conversations", "conversation"):
        value = _decode_cell(row.get(name))
        first = value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}
        if "role" in first:
            columns = {} if name == "messages" else {"messages": name}
            yield from (Detected("instructions", form, columns) for form in (OWN, "openai"))
        elif {"from", "value"} <= first.keys():
            yield Detected("instructions", "sharegpt", {} if name == "conversations" else {"conversations": name})


def _question_candidates(row: Row) -> Iterator[Detected]:
    """Yield alpaca for a question and a reply, under the first names that are there."""
    if isinstance(row.get("label"), bool):  # a thumb up or down: replies that people disliked are no examples
        return
    question = next((name for name in QUESTIONS if name in row), None)
    reply = next((name for name in REPLIES if name in row), None)
    context = next((name for name in CONTEXTS if name in row and name != question), None)
    if question and reply:
        names = {"instruction": question, "input": context, "output": reply}
        yield Detected(
            "instructions", "alpaca", {name: found for name, found in names.items() if found and found != name}
        )


def make_converter(detected: Detected, reasoning: Reasoning) -> Callable[[Row], Row]:
    """Return the function that makes a row of the table of a row with the format's columns."""
    if detected.format in FORMAT_TABLES:
        layout = Layout(detected.format, detected.table, reasoning=reasoning)
        return lambda row: layout.convert(decode_cells(row))
    if detected.table == "instructions":
        return lambda row: _convert_own_chat(decode_cells(row), reasoning)
    if detected.table == "rankings":
        return lambda row: _convert_own_ranking(decode_cells(row), reasoning)
    return lambda row: row


def decode_cells(row: Row) -> Row:
    """Return the row with lists in place of texts that are JSON lists, as in a CSV file or a database."""
    decoded = {name: _decode_cell(row[name]) for name in JSON_COLUMNS if isinstance(row.get(name), str)}
    return {**row, **decoded} if decoded else row


def _decode_cell(value: Any) -> Any:
    if isinstance(value, str):
        if value.lstrip()[:1] == "[":
            try:
                return orjson.loads(value)
            except orjson.JSONDecodeError:
                return value
        return value or None
    return value


def _convert_own_chat(row: Row, reasoning: Reasoning) -> Row:
    absent = {name: None for name in rows.OPTIONAL_COLUMNS["instructions"] if row.get(name) == ""}
    chat = Layout("openai", "instructions", reasoning=reasoning).convert(row)
    return {**row, **absent, **chat}


def _convert_own_ranking(row: Row, reasoning: Reasoning) -> Row:
    prompt, annotators = row.get("prompt"), row.get("annotators")
    changed: dict[str, Any] = {}
    if isinstance(prompt, list):
        changed["prompt"] = [turn for message in prompt for turn in parse_message(message, reasoning)]
    if isinstance(annotators, str):
        changed["annotators"] = json.loads(annotators) if annotators.isdecimal() else annotators or None
    return {**row, **changed} if changed else row
