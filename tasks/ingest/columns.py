"""`columns` of a source: where the columns of a table or a format are in its rows.

The value is the name of a field, a path into nested fields (`meta.body.0.text`; a number is a position in a list), or a
template over fields (`{title}\\n{body}`; `{{` and `}}` are braces).
"""

import datetime
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any

import orjson

MISSING = object()
MAX_EXACT_NUMBER = 2**53  # a larger number may have lost digits when it was read
Getter = Callable[[Mapping[str, Any]], Any]


def is_template(value: str) -> bool:
    """Whether a value of `columns` is a template."""
    return "{" in value or "}" in value


def fields_of(value: str) -> list[str]:
    """Return the fields that a value of `columns` reads; raise ValueError for a template that cannot be filled."""
    if not is_template(value):
        return [value]
    try:
        parts = list(Formatter().parse(value))
    except ValueError as error:
        raise ValueError(f"the template {value!r} is not valid ({error}); {{{{ and }}}} are braces") from error
    fields = [name for _, name, _, _ in parts if name is not None]
    if not fields or any(not name or spec or conversion for _, name, spec, conversion in parts if name is not None):
        raise ValueError(f"the template {value!r} must contain names of fields in braces, such as {{title}}")
    return fields


def lookup(value: Any, path: str) -> Any:
    """Return the value at a path, or MISSING. A field whose name is the whole path comes first."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = orjson.loads(value)
        except ValueError:
            return MISSING
    head, _, rest = path.partition(".")
    if isinstance(value, Mapping):
        if path in value:
            return value[path]
        return lookup(value[head], rest) if rest and head in value else MISSING
    if isinstance(value, list) and head.isdecimal() and int(head) < len(value):
        return lookup(value[int(head)], rest) if rest else value[int(head)]
    return MISSING


def find(row: Mapping[str, Any], path: str) -> Any:
    """Return the value of a field or at a path; None if it is missing."""
    found = row[path] if path in row else lookup(row, path)
    return None if found is MISSING else found


def compile_columns(columns: Mapping[str, str], required: frozenset[str] = frozenset()) -> Getter:
    """Return a function that adds the columns to a row; it raises ValueError if a field of the row is missing.

    Of a column that is not required, a missing field is null.
    """
    getters = {name: _compile(name, value, name in required) for name, value in columns.items()}
    if not getters:
        return lambda row: row
    return lambda row: {**row, **{name: getter(row) for name, getter in getters.items()}}


def _compile(name: str, value: str, required: bool) -> Getter:
    if is_template(value):
        return _compile_template(name, value)

    def get(row: Mapping[str, Any]) -> Any:
        found = row[value] if value in row else lookup(row, value)
        if found is not MISSING:
            return found
        if required:
            raise ValueError(f"{value} missing, which `columns` names for {name}; found {', '.join(map(str, row))}")
        return None

    return get


def _compile_template(name: str, template: str) -> Getter:
    parts = [(text, field) for text, field, _, _ in Formatter().parse(template)]

    def fill(row: Mapping[str, Any]) -> str:
        pieces = []
        for text, field in parts:
            pieces.append(text)
            if field is not None:
                pieces.append(_as_text(lookup(row, field), field, name))
        return "".join(pieces)

    return fill


def _as_text(value: Any, field: str, name: str) -> str:
    """Return a text, a number or a time as text."""
    if value is MISSING or value is None:
        raise ValueError(f"{field} {'missing' if value is MISSING else 'is null'}, which the template of {name} needs")
    if isinstance(value, str | datetime.date | datetime.time):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= MAX_EXACT_NUMBER:
        raise ValueError(
            f"{field} must be text, a time or a number below 2^53 in the template of {name}, found {value!r:.80}"
        )
    return str(value)
