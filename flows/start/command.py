"""`bessemer init`: ask, inspect, design, and create the project; nothing is created if anything is wrong."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import click

from flows import graph, terminal
from flows.start import machine, project, translated
from flows.start.brought import Brought, Table
from flows.start.checkpoint import DEFAULT_CHECKPOINT, read_checkpoint
from flows.start.params_text import render
from flows.start.pipeline import OPTIONS, Design, design
from flows.start.tables import parse_columns, read_table
from flows.start.translation.translate import translate
from tasks.common import params_file
from tasks.common.raw_params import read_params
from tasks.common.settings import BessemerError

Paths = Mapping[str, Sequence[Path]]  # of each option in OPTIONS
README = """# {title}

A Bessemer project, created by `bessemer init`. It contains the pipeline's code, its settings and
its data, so that every model can be reproduced from it.

```
bessemer plan      # what would run, why, and how long it took last time
bessemer run       # train, evaluate, package
bessemer serve     # http://localhost:3000
bessemer report    # the scorecard, and the report of the last run
```

On another machine: `make run` installs the pinned packages into `.venv` and runs the pipeline.

| | |
| --- | --- |
| `params.yaml` | what is trained, from what, and how |
| `data/sources/` | the data; a changed file re-runs what depends on it |
| `models/` | checkpoints that training starts from |
| `dvc.yaml`, `tasks/`, `flows/`, `serving/` | the pipeline |
"""


def init(folder: Path, checkpoint: Path | None, paths: Paths, columns: Sequence[str] = (), *, yes: bool) -> None:
    """Create a project in `folder` from what the user has. Raises BessemerError with what is wrong."""
    project.check_target(folder)
    if not yes:
        checkpoint, paths = _ask_what(checkpoint, paths)
    brought = _inspect(checkpoint, paths, parse_columns(columns))
    if not yes:
        brought = _ask_how(brought)
    create(folder, design(brought, machine.measure()), _files(brought, paths), _describe(brought))


def init_from(folder: Path, file: Path, checkpoint: Path | None) -> None:
    """Create a project in `folder` from a configuration of another tool. Raises BessemerError with what is wrong."""
    project.check_target(folder)
    translation = translate(file)
    translated.show(translation)
    model = read_checkpoint(checkpoint) if checkpoint else translated.checkpoint_of(translation, file)
    planned = translated.design(translation, model)
    texts = {name: text for source in translation.sources for name, text in source.texts.items()}
    create(folder, planned, translated.files(translation, model), f"{translation.tool}, {file.name}", texts)


def create(
    folder: Path,
    planned: Design,
    files: Mapping[str, Path],
    title: str,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Create the project of a design; `texts` are files to write into data/sources/."""
    click.echo()
    for note in planned.notes:
        click.echo(f"note: {note}")
    with project.new_project(folder) as path:
        project.copy_in(path, files)
        for name, text in texts.items():
            (path / project.SOURCES / name).write_text(text, encoding="utf-8")
        settings = render(f"{folder.name}: {title}", planned.sections)
        (path / "params.yaml").write_text(settings, encoding="utf-8")
        (path / "README.md").write_text(README.format(title=folder.name), encoding="utf-8")
        with chdir(path):
            params_file.check(read_params(), stages=list(graph.read(Path())))
        project.commit(path, list(files), f"Project created by bessemer init: {title}")
    _show(folder, planned, len(settings.splitlines()))


def _ask_what(checkpoint: Path | None, paths: Paths) -> tuple[Path | None, Paths]:
    """Ask in the terminal for what the options did not name."""
    if not _has_terminal():
        raise BessemerError("There is no terminal to ask in: add --yes to take the defaults.")
    if checkpoint is None and not any(paths.values()):
        click.echo("Name files and folders, or press Enter to leave one out; several are separated by spaces.\n")
        checkpoint = next(iter(_ask_paths("Checkpoint (a Transformers folder)")), None)
        paths = {name: _ask_paths(QUESTIONS[name]) for name in OPTIONS}
    return checkpoint, paths


def _ask_paths(question: str) -> list[Path]:
    """Ask until every path of the answer exists; the answer is split as a shell splits it."""

    def parse(text: str) -> list[Path]:
        try:
            paths = [Path(part).expanduser() for part in shlex.split(text)]
        except ValueError as error:
            raise click.UsageError(f"{error} in {text}; close it.") from error
        for path in paths:
            if not path.exists():
                raise click.UsageError(f"{path} does not exist; correct the path, and quote one that contains spaces.")
        return paths

    asked: list[Path] = click.prompt(question, default="", show_default=False, value_proc=parse)
    return asked


def _has_terminal() -> bool:
    return sys.stdin.isatty()


QUESTIONS = {
    "text": "Texts (files or folders of documents)",
    "conversations": "Conversations (questions with their answers)",
    "preferences": "Preferences (pairs or rankings of answers)",
    "labels": "Labels (texts with a class each)",
}


def _ask_how(brought: Brought) -> Brought:
    """Ask for decisions that what is brought leaves open."""
    if "rankings" in brought and "instructions" in brought:
        chosen = click.prompt(
            "Align with a reward model and PPO, or with DPO on the pairs themselves?", default=brought.align,
            type=click.Choice(["ppo", "dpo"]),
        )  # fmt: skip
        brought = replace(brought, align=chosen)
    if not brought.checkpoint and brought.tables.keys() <= {"corpus", "labels"}:
        question = "Train an encoder (fills masks, classifies) instead of a model that continues text?"
        brought = replace(brought, encoder=click.confirm(question, default=brought.encoder))
    return brought


def _inspect(checkpoint: Path | None, paths: Paths, columns: Mapping[str, str]) -> Brought:
    """Read what is brought and print a line about each part."""
    model = read_checkpoint(checkpoint) if checkpoint else None
    if not checkpoint and not paths.get("text") and (paths.get("conversations") or paths.get("preferences")):
        model = DEFAULT_CHECKPOINT  # conversations alone teach no language
    if model:
        click.echo(f"{model.path}: {model.describe()}")
    tables: dict[str, Table] = {}
    for option, table in OPTIONS.items():
        if paths.get(option):
            tables[table] = read_table(option, paths[option], columns)
    encoder = model is None and tables.keys() == {"corpus", "labels"}  # preferences need a model that answers
    return Brought(model, tables, encoder=encoder)


def _files(brought: Brought, paths: Paths) -> dict[str, Path]:
    """Return what is copied: path in the project -> the user's file or folder."""
    models = brought.checkpoint.files if brought.checkpoint else {}
    data = {f"{project.SOURCES}/{path.name}": path for option in OPTIONS for path in paths.get(option, ())}
    return models | data


def _describe(brought: Brought) -> str:
    """Return what the project is made from: `SmolLM2-135M, conversations, preferences`."""
    options = {table: option for option, table in OPTIONS.items()}
    parts = [brought.checkpoint.path.name] if brought.checkpoint else []
    return ", ".join([*parts, *(options[table] for table in brought.tables)])


def _show(folder: Path, planned: Design, lines: int) -> None:
    """Print the stages with their estimated times, and the next commands."""
    out = terminal.console()
    total = sum(planned.seconds.values())
    for stage, seconds in planned.seconds.items():
        out.print(f"  {stage:18} about {terminal.duration(seconds)}")
    out.print(
        f"The first run takes about {terminal.duration(total + 120)} on this machine."
        if planned.seconds else "`bessemer run` shows how long its stages take."
    )  # fmt: skip
    out.print(f"\nCreated {folder} (params.yaml has {lines} lines; everything in it can be changed). Next:")
    terminal.show_commands(out, ((f"cd {folder}", ""), ("bessemer run", "train, evaluate, package"),
                                 ("bessemer serve", "answer on http://localhost:3000")))  # fmt: skip
