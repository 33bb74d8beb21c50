"""Options of `bessemer init` that are followed by several paths: `--text a.txt b.txt`."""

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
