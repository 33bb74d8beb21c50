"""The reference of all settings, `docs/reference/settings.md`, generated from the settings classes by `make docs`."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from tasks.common.defaults import DISCRIMINATORS, default_of, ordered_fields, sections, settings_classes
from tasks.common.settings import ENTRY_SECTIONS, Settings

HEAD = """# Settings

Generated from the settings classes by `make docs`; a test keeps it current. `params.yaml` overrides the defaults listed
here; `bessemer params` prints every value in effect and where it comes from. A setting without a default must be in
`params.yaml`. An unknown key is an error. A section with `ENTRY` in its heading contains entries, and each entry is a
stage ([The graph](../guides/graph.md)). A stage's settings and `numerics` affect the bytes of its results and are part
of their identity; `placement` does not affect them and is not part of it.
"""
COLUMNS = "| setting | type | default | bounds | |\n| --- | --- | --- | --- | --- |"
SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
SIMPLE = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
Group = type[Settings]
GroupLocations = dict[type[Settings], tuple[str, str]]


def markdown() -> str:
    """Return the page."""
    parts, locations = [HEAD], _group_locations()
    for heading, kind in _classes().items():
        parts.append(f"## {heading}\n\n{_summary(kind)}")
        parts.append(_table(kind, locations))
        parts += [
            text
            for group, location in locations.items()
            if location[0] == heading
            for text in _group_section(group, locations)
        ]
    return "\n".join(parts).rstrip() + "\n"


def _classes() -> dict[str, Group]:
    """Return the class of each section by heading; a section with entries has a heading per class of its entries."""
    return {
        f"{name}.ENTRY{f': {_discriminator(kind)}' if _discriminator(kind) else ''}"
        if name in ENTRY_SECTIONS
        else name: kind
        for name, annotation in sections().items()
        for kind in settings_classes(annotation)
    }


def _group_locations() -> GroupLocations:
    """Return for every nested group the heading of the first section that contains it, and its path there."""
    found: GroupLocations = {}
    for heading, kind in _classes().items():
        for group, where in _nested_groups(kind, tuple(heading.partition(":")[0].split("."))):
            found.setdefault(group, (heading, where))
    return found


def _nested_groups(kind: Group, path: tuple[str, ...]) -> Iterator[tuple[Group, str]]:
    for name, field in kind.model_fields.items():
        for group in dict.fromkeys(settings_classes(field.annotation)):
            choice = _discriminator(group)
            yield group, ".".join((*path, name)) + (f": {choice}" if choice else "")
            yield from _nested_groups(group, (*path, name))


def _discriminator(group: Group) -> str:
    """Return the value of `name` or `kind` that selects a group from several; empty if there is none."""
    for chooser in DISCRIMINATORS:
        field = group.model_fields.get(chooser)
        if field is not None and get_origin(field.annotation) is Literal:
            return str(get_args(field.annotation)[0])
    return ""


def _group_section(group: Group, locations: GroupLocations) -> Iterator[str]:
    yield f"### {locations[group][1]}\n\n{_summary(group)}"
    if any(name not in DISCRIMINATORS for name in group.model_fields) or not _discriminator(group):
        yield _table(group, locations)


def _summary(kind: Group) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split()) + "\n"


def _table(kind: Group, locations: GroupLocations) -> str:
    rows = [
        f"| `{name}` | {_type(field, locations)} | {_default(field)} | {_bounds(field)} | {_field_description(field)} |"
        for name, field in ordered_fields(kind)
    ]
    return "\n".join([COLUMNS, *rows]) + "\n"


def _field_description(field: FieldInfo) -> str:
    """Return a field's description, or else the summary of its only group."""
    kinds = list(dict.fromkeys(settings_classes(field.annotation)))
    return _escape(field.description or (_summary(kinds[0]).strip() if len(kinds) == 1 else ""))


def _type(field: FieldInfo, locations: GroupLocations) -> str:
    kinds = list(dict.fromkeys(settings_classes(field.annotation)))
    if not kinds:
        return _escape(_type_text(field.annotation))
    links = [f"[{_discriminator(kind) or locations[kind][1]}](#{_anchor(locations[kind][1])})" for kind in kinds]
    several = "list of " if get_origin(field.annotation) is list else ""
    return several + ", ".join(links) + (" or null" if type(None) in get_args(field.annotation) else "")


def _anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return "".join(sign for sign in heading.lower().replace(" ", "-") if sign.isalnum() or sign in "-_")


def _type_text(annotation: Any) -> str:
    """Return a type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list of {_type_text(inner[0])}"
    if origin is dict:
        return f"mapping of {_type_text(inner[0])} to {_type_text(inner[1])}"
    if hasattr(annotation, "__metadata__"):
        return _type_text(inner[0])
    return " or ".join(dict.fromkeys(_type_text(part) for part in inner))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "–"
    value = default_of(field)
    if any(True for _ in settings_classes(field.annotation)) and isinstance(value, dict):
        return next((f"`{value[name]}`" for name in DISCRIMINATORS if name in value), "its defaults")
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """Return a value in YAML syntax."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(item)}' for key, item in value.items())}}}"
    return str(value)


def _bounds(field: FieldInfo) -> str:
    """Return the bounds of a value, or of the length of a string or list."""
    found = []
    for limit in field.metadata:
        for kind, (sign, name) in SIGNS.items():
            if isinstance(limit, kind):
                found.append(f"{sign} {_yaml(getattr(limit, name))}")
        if isinstance(limit, MinLen) and limit.min_length:
            found.append(f"length ≥ {limit.min_length}")
        if isinstance(limit, MaxLen):
            found.append(f"length ≤ {limit.max_length}")
        if getattr(limit, "pattern", None):
            found.append(f"like `{limit.pattern}`")
    return _escape(", ".join(found))


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
