"""Effective settings: the values of `params.yaml` and the defaults of keys that it leaves out.

Known keys of an invalid file are filled in too, so that all its problems can be reported at once. This module is not
part of a recipe: a stage's own settings get their defaults when its class is instantiated.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from tasks.common.harness.job import module_of
from tasks.common.raw_params import read_params
from tasks.common.settings import ENTRY_SECTIONS, STAGES, Base, Numerics, Placement, Settings
from tasks.common.source_names import fill_names

SHARED_SECTIONS: dict[str, type[Settings]] = {"base": Base, "numerics": Numerics, "placement": Placement}
DISCRIMINATORS = ("name", "kind", "objective")  # keys that choose between several classes of settings


def sections() -> dict[str, Any]:
    """Return the class of every section or, where a section holds entries, the class (or union) of its entries."""
    found: dict[str, Any] = dict(SHARED_SECTIONS)
    for stage in STAGES:
        found[stage] = module_of(stage).Config
        if stage == "evaluate":
            found["evaluations"] = module_of(stage).AnyEvaluation
    return found


def with_defaults(params: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a `params.yaml` with the defaults of keys that it leaves out, and names of sources."""
    result = dict(params)
    ingest = params.get("ingest")
    if isinstance(ingest, dict) and isinstance(ingest.get("sources"), list):
        result["ingest"] = {**ingest, "sources": fill_names(ingest["sources"])}
    for name, kind in sections().items():
        content = result.get(name)
        if name in ENTRY_SECTIONS and isinstance(content, dict):
            result[name] = {key: _fill_value(kind, entry) for key, entry in content.items()}
        elif name in params:
            result[name] = _fill_value(kind, content)
    return result


def fill_defaults(kind: type[Settings], value: Any) -> Any:
    """Return a mapping with the defaults of its class, recursively; return other values unchanged."""
    if not isinstance(value, dict):
        return value
    result = dict(value)
    for name, field in kind.model_fields.items():
        if name in value:
            result[name] = _fill_value(field.annotation, value[name])
        elif not field.is_required():
            result[name] = default_of(field)
    return result


def default_of(field: FieldInfo) -> Any:
    """Return a field's default as YAML would contain it."""
    value = field.get_default(call_default_factory=True, validated_data={})
    return value.model_dump(mode="json") if isinstance(value, Settings) else value


def _fill_value(annotation: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_fill_value(annotation, item) for item in value]
    kind = choose_class(annotation, value)
    return value if kind is None else fill_defaults(kind, value)


def choose_class(annotation: Any, value: Any) -> type[Settings] | None:
    """Return the class of settings that a value belongs to, of those that a type allows; None if there is none."""
    kinds = list(dict.fromkeys(settings_classes(annotation)))
    if not isinstance(value, dict) or len(kinds) <= 1:
        return kinds[0] if kinds and isinstance(value, dict) else None
    for chooser in DISCRIMINATORS:
        for kind in kinds:
            field = kind.model_fields.get(chooser)
            if field is not None and value.get(chooser) in get_args(field.annotation):
                return kind
    return None


def settings_classes(kind: Any) -> Iterator[type[Settings]]:
    """Yield the classes of settings that a type allows."""
    if isinstance(kind, type) and issubclass(kind, Settings):
        yield kind
    for part in get_args(kind):
        yield from settings_classes(part)


def ordered_fields(kind: type[Settings]) -> list[tuple[str, FieldInfo]]:
    """Return the (name, field) pairs of a class, discriminators first."""
    return sorted(kind.model_fields.items(), key=lambda item: item[0] not in DISCRIMINATORS)


def read_settings(path: Path = Path("params.yaml")) -> dict[str, Any]:
    """Return the contents of a `params.yaml` with all defaults; raise SettingsError if it cannot be read."""
    return with_defaults(read_params(path))
