"""`bessemer params`: every setting in effect, and where its value comes from."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tasks.common.defaults import choose_class, default_of, ordered_fields, sections, with_defaults
from tasks.common.raw_params import read_params
from tasks.common.settings import ENTRY_SECTIONS, Settings, SettingsError

FILE = "params.yaml"
INDENT = "  "


@dataclass(frozen=True)
class Line:
    """A setting with its path, value and origin, or the heading of a group."""

    path: tuple[str, ...]
    value: Any = None
    origin: str = ""
    heading: bool = False
    differs: bool = False  # its value is not the default, or it has no default

    @property
    def yaml_text(self) -> str:
        """The value as one line of YAML."""
        return json.dumps(self.value, ensure_ascii=False) if _needs_quotes(self.value) else str(self.value)


def show(out: Console, project: Path, wanted: Iterable[str], *, only_different: bool = False) -> None:
    """Print the settings of a project with their origins: those of the `wanted` sections, or all."""
    lines = list(_select_lines(project, wanted))
    if only_different:
        lines = list(_without_empty_groups([line for line in lines if line.heading or line.differs]))
    label = max((len(INDENT) * (len(line.path) - 1) + len(line.path[-1]) for line in lines), default=0) + 2
    value = max((len(line.yaml_text) for line in lines if not line.heading), default=0)
    value = min(value, 48) + 2  # a longer value moves its origin to the right
    for line in lines:
        start = INDENT * (len(line.path) - 1) + line.path[-1] + ":"
        if line.heading:
            out.print(Text(start, style="bold" if len(line.path) == 1 else ""))
            continue
        origin = Text(f"# {line.origin}", style="green" if line.origin == FILE else "dim")
        out.print(Text.assemble(start.ljust(label), line.yaml_text.ljust(value - 2), "  ", origin), soft_wrap=True)


def as_json(project: Path, wanted: Iterable[str], *, only_different: bool = False) -> str:
    """Return the settings as a JSON object of dotted paths to values and origins."""
    lines = (line for line in _select_lines(project, wanted) if not line.heading)
    found = {
        ".".join(line.path): {"value": line.value, "origin": line.origin}
        for line in lines
        if line.differs or not only_different
    }
    return json.dumps(found, indent=1, ensure_ascii=False)


def lines_of(params: dict[str, Any]) -> Iterator[Line]:
    """Yield every setting of a parsed `params.yaml`, in the order of the sections and of their classes."""
    complete = with_defaults(params)
    for name, kind in sections().items():
        explicit, value = params.get(name) or {}, complete.get(name) or {}
        yield Line((name,), heading=True)
        if name not in ENTRY_SECTIONS:
            yield from _group_lines(kind, (name,), explicit, value)
        for key, entry in value.items() if name in ENTRY_SECTIONS else ():
            yield Line((name, key), heading=True)
            if group := choose_class(kind, entry):
                yield from _group_lines(group, (name, key), explicit[key], entry)


def _select_lines(project: Path, wanted: Iterable[str]) -> Iterator[Line]:
    """Yield the lines of the wanted settings (`finetune.chat.task`); raise SettingsError for an unknown name."""
    lines, names = list(lines_of(read_params(project / FILE))), [tuple(name.split(".")) for name in wanted]
    for name in names:
        if not any(line.path[: len(name)] == name for line in lines):
            first = dict.fromkeys(line.path[0] for line in lines)
            raise SettingsError(f"There is no setting {'.'.join(name)}. The sections are {', '.join(first)}.")
    for line in lines:
        if not names or any(_is_selected(line, name) for name in names):
            yield line


def _is_selected(line: Line, name: tuple[str, ...]) -> bool:
    """Whether a line belongs to the named setting or group, or is one of its headings."""
    return line.path[: len(name)] == name or (line.heading and name[: len(line.path)] == line.path)


def _group_lines(kind: type[Settings], path: tuple[str, ...], explicit: Any, complete: Any) -> Iterator[Line]:
    for name, field in ordered_fields(kind):
        here, value = (*path, name), complete.get(name)
        present = isinstance(explicit, dict) and name in explicit
        default = None if field.is_required() else default_of(field)
        origin = FILE if present else f"default of {_class_name(kind)}"
        inner = choose_class(field.annotation, value)
        if isinstance(value, list) and value and all(choose_class(field.annotation, item) for item in value):
            yield Line(here, heading=True)
            for number, item in enumerate(value):
                yield Line((*here, str(number)), heading=True)
                group = choose_class(field.annotation, item)
                assert group is not None
                yield from _group_lines(group, (*here, str(number)), explicit[name][number], item)
        elif inner is not None:
            yield Line(here, heading=True)
            yield from _group_lines(inner, here, explicit[name] if present else {}, value)
        else:
            yield Line(here, value, origin, differs=present and (field.is_required() or value != default))


def _class_name(kind: type[Settings]) -> str:
    """Return the name of a settings class; a stage's main class, always `Config`, gets the stage's name as prefix."""
    return kind.__name__ if kind.__name__ != "Config" else f"{_stage_of(kind)}.Config"


def _stage_of(kind: type[Settings]) -> str:
    """Return the stage whose module defines a class."""
    return kind.__module__.removesuffix(".stage").rpartition(".")[2]


def _without_empty_groups(lines: list[Line]) -> Iterator[Line]:
    """Drop the headings of groups without lines."""
    for line in lines:
        within = (other for other in lines if not other.heading and other.path[: len(line.path)] == line.path)
        if not line.heading or any(within):
            yield line


def _needs_quotes(value: Any) -> bool:
    """Whether a value is written as JSON: everything except plain words and numbers."""
    return (
        not isinstance(value, int | float | str)
        or isinstance(value, bool)
        or (isinstance(value, str) and (not value or not value[0].isalnum() or ": " in value or " #" in value))
    )
