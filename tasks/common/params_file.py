"""Check `params.yaml`: all problems are reported at once, before anything runs.

This module is not part of a recipe, because it only checks settings.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from tasks.common import model_graph
from tasks.common.defaults import SHARED_SECTIONS, sections, settings_classes, with_defaults
from tasks.common.harness.job import module_of, shared_sections, stage_of
from tasks.common.model_graph import entries_of
from tasks.common.settings import ENTRY_SECTIONS, STAGES, SettingsError


def config_of(module: ModuleType, params: dict[str, Any], key: str | None) -> tuple[str, Any]:
    """Return a stage's section (`finetune.chat`) and its validated config; call `check` first.

    If a section holds entries, the module's `Config` is the class of one entry, or a union of several classes.
    """
    stage = stage_of(module)
    if key is None:
        return stage, TypeAdapter(module.Config).validate_python(params[stage])
    return f"{stage}.{key}", TypeAdapter(module.Config).validate_python(params[stage][key])


def sections_of(module: ModuleType, params: dict[str, Any], key: str | None) -> dict[str, dict[str, Any]]:
    """Return the validated entries of the sections that a stage reads besides its own; call `check` first.

    Of entries that are for some models only, it includes those for the entry `key`.
    """
    found = {}
    for name in shared_sections(module):
        kind: TypeAdapter[Any] = TypeAdapter(sections()[name])
        content = {entry: kind.validate_python(value) for entry, value in entries_of(params, name).items()}
        content = content or module_of("evaluate").default_evaluations()
        found[name] = {entry: one for entry, one in content.items() if key is None or key in (one.models or [key])}
    return found


def check(
    params: dict[str, Any], name: str = "params.yaml", stages: Iterable[str] = (), files_of: Iterable[str] = ()
) -> None:
    """Raise SettingsError with every problem in the settings of the file `name`.

    With `stages` (`quantize@chat`), it includes problems that prevent only these stages from running, with `files_of`
    those of files that these stages read.

    Stage modules are imported by name, not statically, so that the code of other stages does not enter a stage's
    recipe.
    """
    consistency = import_module("tasks.rules.consistency")  # by name: no stage's recipe has the rules
    problems: list[str] = []
    expected = {"base", "numerics", "placement", "evaluations", *STAGES}
    unknown = [section for section in params if section not in expected]
    problems += [f"{section}: unknown section; there are {', '.join(sorted(expected))}" for section in unknown]
    problems += [f"{section}: this section is missing" for section in sorted(expected) if section not in params]
    for section, model in SHARED_SECTIONS.items():
        problems += _validate(model, params, (section,))
    for section, config in sections().items():
        if section in SHARED_SECTIONS:
            continue
        if section not in ENTRY_SECTIONS:
            problems += _validate(config, params, (section,))
        elif section in params and not isinstance(params[section], dict):
            problems.append(
                f"{section}: found {_short(params[section])}, but it should hold entries by name, or be {{}}"
            )
        for key in entries_of(params, section) if section in ENTRY_SECTIONS else ():
            problems += _validate(config, params, (section, key))
    graph_problems = list(model_graph.check_graph(params))
    if graph_problems:  # the rules below need a valid graph
        problems += graph_problems
        stages = ()
    else:
        problems += consistency.check_settings(with_defaults(params))
    stages = list(stages)
    problems += consistency.check_files(with_defaults(params), dict.fromkeys([*stages, *files_of]))
    problems += consistency.check_stages(with_defaults(params), stages)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise SettingsError(f"{name} has {count}; nothing was run.\n{listed}")


def _validate(model: Any, params: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    value: Any = params
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return
        value = value[name]
    try:
        TypeAdapter(model).validate_python(value)
    except ValidationError as error:
        for item in error.errors():
            yield _describe_error(model, path, value, item)


def _describe_error(model: Any, path: tuple[str, ...], value: Any, item: Any) -> str:
    kind, found = item["type"], item["input"]
    where = ".".join((*path, *_keys(value, item["loc"], absent=kind == "missing")))
    if kind == "missing":
        return f"{where}: this key is missing"
    if kind == "extra_forbidden":
        return f"{where}: unknown key (found {found!r}); there are {_names_beside(model, item['loc'])}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        context = {name: str(text).replace("'", "") for name, text in item["ctx"].items()}
        where = f"{where}.{context['discriminator']}"
        if kind == "union_tag_not_found":
            return f"{where}: this key is missing"
        return f"{where}: found {item['ctx']['tag']!r}, but it should be one of {context['expected_tags']}"
    if kind == "value_error" and isinstance(found, dict):  # keys that contradict each other; the rule names them
        return f"{where}: {_rule(item['msg'])}"
    return f"{where}: found {_short(found)}, but {_rule(item['msg'])}"


def _names_beside(model: Any, location: tuple[str | int, ...]) -> str:
    """Return the keys that are allowed at a location; in a union, pydantic's location includes the chosen class."""
    kinds = list(settings_classes(model))
    for key in location[:-1]:
        fields = [group.model_fields for group in kinds]
        nested = [kind for named in fields if key in named for kind in settings_classes(named[str(key)].annotation)]
        chosen = [
            group for group in kinds if any(key in get_args(kind.annotation) for kind in group.model_fields.values())
        ]
        kinds = nested or chosen or kinds
    return ", ".join(dict.fromkeys(name for group in kinds for name in group.model_fields))


def _keys(value: Any, location: tuple[str | int, ...], *, absent: bool) -> Iterator[str]:
    """Yield the keys of a problem's location that occur in the file: in a union, pydantic adds the chosen class.

    The last key of a missing setting is included although it does not occur.
    """
    for index, key in enumerate(location):
        present = key in value if isinstance(value, dict) else isinstance(value, list)
        if present or (absent and index == len(location) - 1):
            yield str(key)
            value = value[key] if present else None


def _rule(message: str) -> str:
    message = message.removeprefix("Value error, ").replace("Input should be", "it should be")
    return message[:1].lower() + message[1:] if message[:2] != message[:2].upper() else message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
