"""Translates a training configuration of LLaMA-Factory or axolotl into settings of this project.

`translate` reads the file, decides which tool it belongs to and returns what a project takes over from it. Every key of
the file is translated, has no effect on the model, or is named with the reason why it is not translated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.start.translation import axolotl, llamafactory
from flows.start.translation.keys import Keys
from flows.start.translation.result import Draft, Tool, Translation
from flows.start.translation.short_form import without_defaults
from tasks.common.settings import SettingsError

TOOLS: dict[Tool, Any] = {"llamafactory": llamafactory, "axolotl": axolotl}
TITLES: dict[Tool, str] = {"llamafactory": "LLaMA-Factory", "axolotl": "axolotl"}


def translate(file: Path) -> Translation:
    """Return the translation of a configuration file.

    Raises SettingsError if it is not one, and with all problems at once where values or files are wrong.
    """
    content = _read(file)
    tool, decided_by = _decide(file, content)
    module, draft = TOOLS[tool], Draft()
    keys = Keys(content)
    module.refuse_unusable(keys)
    _raise_problems(file, keys, TITLES[tool])
    checkpoint, adapter = module.read_model(keys, file, draft)
    template = keys.text(module.TEMPLATE_KEY)
    sources = module.translate_keys(keys, file, draft)
    _raise_problems(file, keys, TITLES[tool])
    if template:
        draft.notes.append(f"The checkpoint's own chat template is kept; {template} is for a checkpoint without one.")
    if adapter:
        draft.notes.append(f"The adapter {adapter} is merged with its base model; training starts from the result.")
    return Translation(
        tool=tool,
        decided_by=decided_by,
        checkpoint=checkpoint,
        adapter=adapter,
        template=template,
        sources=sources,
        sections=without_defaults(draft.sections),
        epochs=draft.epochs,
        warmup_steps=draft.warmup_steps,
        heldout_rows=draft.heldout_rows,
        untranslated=(*draft.untranslated, *keys.untranslated),
        without_effect=tuple(keys.without_effect),
        notes=tuple(draft.notes),
    )


def _read(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML (or JSON) file."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not file.is_file():
        raise SettingsError(f"{file}: expected a configuration of LLaMA-Factory or axolotl there, found no file.")
    try:
        content = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8-sig"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: expected YAML in UTF-8, found something else: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"{file}: expected settings by name, found {type(content).__name__}.")
    return content


def _decide(file: Path, content: Mapping[str, Any]) -> tuple[Tool, tuple[str, ...]]:
    """Return the tool that has the file's keys, and these keys."""
    found = {tool: tuple(key for key in module.ONLY_KEYS if key in content) for tool, module in TOOLS.items()}
    (tool, keys), (other, fewer) = sorted(found.items(), key=lambda item: -len(item[1]))
    if not keys:
        expected = "; ".join(f"{TITLES[name]} has {', '.join(module.ONLY_KEYS)}" for name, module in TOOLS.items())
        raise SettingsError(
            f"{file}: expected a configuration of LLaMA-Factory or axolotl, found none of their keys ({expected})."
        )
    if len(keys) == len(fewer):
        raise SettingsError(
            f"{file}: expected the keys of one tool, found {', '.join(keys)} of {TITLES[tool]} and {', '.join(fewer)} "
            f"of {TITLES[other]}; remove those of one."
        )
    return tool, keys


def _raise_problems(file: Path, keys: Keys, title: str) -> None:
    problems = list(dict.fromkeys(keys.problems))  # a key that is read twice reports twice
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise SettingsError(f"{file} ({title}) has {count}; nothing was written.\n{listed}")
