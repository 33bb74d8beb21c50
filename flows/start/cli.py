"""The command `bessemer init`, whose options may be followed by several paths: `--text a.txt b.txt`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class PathsCommand(click.Command):
    """A command whose `multiple` options may be followed by several values."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Repeat an option's name before each further value."""
        repeated = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        expanded: list[str] = []
        option = ""
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in repeated else ""
            elif option and expanded[-1] != option:
                expanded.append(option)
            expanded.append(arg)
        return super().parse_args(context, expanded)


def paths_option(name: str, help: str) -> Callable[[Command], Command]:
    """Return the decorator of an option with one or more paths."""
    return click.option(f"--{name}", multiple=True, metavar="PATH...", type=click.Path(path_type=Path), help=help)


@click.command(cls=PathsCommand)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", metavar="FOLDER", type=click.Path(path_type=Path), help="A Transformers model to start from."
)
@paths_option("text", "Documents: files, folders.")
@paths_option("conversations", "Questions with their answers, in any common format.")
@paths_option("preferences", "Pairs or rankings of answers.")
@paths_option("labels", "Texts with a class or a number each.")
@click.option(
    "--columns",
    multiple=True,
    metavar="NAME=FIELD...",
    help="Where a column is in files that call it otherwise: a field, a path, a template.",
)
@click.option(
    "--from",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A LLaMA-Factory or axolotl YAML to translate.",
)
@click.option("--yes", is_flag=True, help="Ask nothing and take the defaults.")
def init(
    folder: Path, checkpoint: Path | None, columns: tuple[str, ...], file: Path | None, yes: bool,
    **paths: tuple[Path, ...],
) -> None:  # fmt: skip
    """Create a project in DIR from what you have; asks for the rest. Nothing is trained yet.

    \b
    Examples:
      bessemer init support --checkpoint ~/models/Qwen3-0.6B --conversations chats.jsonl
      bessemer init tuned --checkpoint m --conversations chats.jsonl --preferences pairs.jsonl --yes
      bessemer init handbook --text docs/ --yes         a new model, trained from nothing
      bessemer init served --checkpoint m --yes         the checkpoint, packaged and served
      bessemer init pairs --preferences args.jsonl --columns "prompt={topic}: {stance}" --yes
      bessemer init mine --from llama3_lora_sft.yaml
    """
    from flows.start import command

    if file:
        given = [f"--{name}" for name, values in paths.items() if values]
        if given:
            raise click.UsageError(f"--from names the data itself: leave out {', '.join(given)}.")
        command.init_from(folder, file, checkpoint)
        return
    command.init(folder, checkpoint, paths, columns, yes=yes)
