"""A project from a configuration of LLaMA-Factory or axolotl: its settings, and what `init` adds to serve the model."""

from pathlib import Path
from typing import Any

import click

from flows.start import machine
from flows.start.brought import CHARACTERS_PER_TOKEN
from flows.start.checkpoint import Checkpoint, read_checkpoint
from flows.start.pipeline import LARGE_MODEL, MAX_TOKENS, Design, ending, shared_sections
from flows.start.translation.files import count_rows
from flows.start.translation.result import CHECKPOINT, Translation
from tasks.common.settings import BessemerError

NAMES = {"pretrain": "start", "finetune": "tuned", "align": "policy"}  # stage: the name of its model in the scorecard


def show(translation: Translation) -> None:
    """Print which tool's file it is, and what was not translated."""
    click.echo(f"{translation.tool} (it has {', '.join(translation.decided_by)})")
    for line in translation.untranslated:
        click.echo(f"  not translated: {line}")
    if translation.without_effect:
        click.echo(f"  without effect on the model: {', '.join(translation.without_effect)}")
    for note in translation.notes:
        click.echo(f"  {note}")


def checkpoint_of(translation: Translation, file: Path) -> Checkpoint:
    """Return the adapter or the model of a translation. Raises BessemerError if neither is on this machine."""
    if translation.adapter:
        return read_checkpoint(translation.adapter)
    if translation.checkpoint is None:
        raise BessemerError(
            f"{file} names no model folder on this machine: download the model, and name its folder with --checkpoint."
        )
    return read_checkpoint(translation.checkpoint)


def design(translation: Translation, checkpoint: Checkpoint) -> Design:
    """Return the pipeline of a translated configuration, with an export, a scorecard and a package."""
    sections = _replace(translation.with_steps(amounts(translation)), CHECKPOINT, checkpoint.folder)
    sources = {"sources": [dict(source.settings) for source in translation.sources]}
    sections["ingest"] = {**sections.get("ingest", {}), **sources}
    context = min(checkpoint.context, MAX_TOKENS)
    sections.setdefault("tokenize", {"tokenizer": {"name": "from", "path": checkpoint.folder}, "context": context})
    evaluated, model = {"start": checkpoint.folder}, checkpoint.folder
    for stage, name in NAMES.items():
        for key in sections.get(stage, {}):
            model = evaluated[name] = f"data/{stage}/{key}/model"
    large = checkpoint.parameters > LARGE_MODEL
    sections |= ending(evaluated, {"chat": model}, checkpoint.context, large=large)
    shared = shared_sections(machine.measure())
    return Design({**shared, **sections, "numerics": {**shared["numerics"], **sections.get("numerics", {})}})


def files(translation: Translation, checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the files to copy: path in the project -> the user's file or folder."""
    copies = {f"data/sources/{name}": path for source in translation.sources for name, path in source.copies.items()}
    return checkpoint.files | copies


def amounts(translation: Translation) -> dict[str, int]:
    """Return the rows (for `pretrain`, the tokens) that each entry is trained on."""
    from tasks.ingest.inspection import inspect

    copied = [item for source in translation.sources for item in source.copies.items()]
    paths = [path for name, path in copied if not name.endswith("dataset_info.json")]
    if any(where.startswith("pretrain.") for where in translation.entries):
        found = [inspect(path) for path in paths]
        tokens = sum(one.estimated_rows * one.mean_characters for one in found) / CHARACTERS_PER_TOKEN
        return dict.fromkeys(translation.entries, int(tokens))
    return dict.fromkeys(translation.entries, sum(map(count_rows, paths)))


def _replace(value: Any, old: str, new: str) -> Any:
    """Return nested settings with a text replaced."""
    if isinstance(value, dict):
        return {key: _replace(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, old, new) for item in value]
    return new if value == old else value
