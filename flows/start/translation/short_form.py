"""Leaves out of sections what the settings classes have as their default, so that `params.yaml` stays short."""

from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

from tasks.common.defaults import choose_class, default_of, fill_defaults, sections
from tasks.common.settings import ENTRY_STAGES


def without_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections without the values that equal their defaults; sections that become empty are left out."""
    kinds = sections()
    short = {}
    for name, section in content.items():
        if name in ENTRY_STAGES:
            short[name] = {key: _shorten(kinds[name], entry) for key, entry in section.items()}
        else:
            short[name] = _shorten(kinds[name], section)
    return {name: section for name, section in short.items() if section}


def _shorten(annotation: Any, value: Any) -> Any:
    kind = choose_class(annotation, value)
    if kind is None:
        return value
    fields = kind.model_fields
    shortened = {name: _shorten(fields[name].annotation, item) for name, item in value.items()}
    return {name: item for name, item in shortened.items() if not _is_default(fields[name], value[name], item)}


def _is_default(field: FieldInfo, value: Any, shortened: Any) -> bool:
    """Return whether a value says nothing: it equals its default, or all of it does."""
    kind = choose_class(field.annotation, value)
    whole = value if kind is None else fill_defaults(kind, value)
    return not field.is_required() and (whole == default_of(field) or shortened == {})
