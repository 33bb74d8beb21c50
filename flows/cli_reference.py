"""Write `docs/reference/cli.md` from the commands' help texts: `python -m flows.cli_reference`, or `make docs`.

A test compares the page with `render()`.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from flows.cli import cli

PAGE = Path("docs/reference/cli.md")
PREFORMATTED = "\b"  # click's marker of a paragraph that keeps its line breaks
HEAD = """# Command line

<!-- Generated from the help texts in flows/cli.py by `make docs`. Do not edit. -->

`bessemer` works in any folder of a project: it looks for the nearest `dvc.yaml` upwards. Every command has `--help`.
An error that you can fix is one message on standard error and exit code 1; a stopped command exits with code 130.

`source .venv/bin/activate` puts `bessemer`, `dvc`, `prefect` and `bentoml` on the path.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """Return the page: a table of all commands, then one section per command."""
    found = list(commands(cli, click.Context(cli, info_name="bessemer")))
    rows = [f"| [`{path}`](#{path.replace(' ', '-')}) | {command.get_short_help_str(200)} |" for path, command in found]
    table = "\n".join(["| command | what it does |", "| --- | --- |", *rows])
    return "\n".join([HEAD, f"{table}\n", *(section(path, command) for path, command in found)])


def commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    """Yield every command of a group with its full name, a subgroup before its commands."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        inner = click.Context(command, info_name=name, parent=context)
        yield inner.command_path, command
        if isinstance(command, click.Group):
            yield from commands(command, inner)


def section(path: str, command: click.Command) -> str:
    """Return the section of one command: summary, usage, options, examples."""
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    first, *others = paragraphs(command.help or "")
    parts = [f"## {path}\n", first, f"```text\n{usage}\n```\n"]
    options = [option(parameter, context) for parameter in command.params if isinstance(parameter, click.Option)]
    if options:
        parts.append("\n".join(["| option | meaning |", "| --- | --- |", *options]) + "\n")
    return "\n".join([*parts, *others]).rstrip("\n") + "\n"


def paragraphs(help_text: str) -> Iterator[str]:
    """Yield the paragraphs of a help text in Markdown, examples as code blocks."""
    for paragraph in inspect.cleandoc(help_text).split("\n\n"):
        if not paragraph.startswith(PREFORMATTED):
            yield " ".join(paragraph.split()) + "\n"
            continue
        lines = paragraph.removeprefix(PREFORMATTED).strip("\n").splitlines()
        if lines[0].endswith(":"):
            yield lines.pop(0) + "\n"
        yield "```text\n" + inspect.cleandoc("\n" + "\n".join(lines)) + "\n```\n"


def option(parameter: click.Option, context: click.Context) -> str:
    """Return the table row of one option."""
    names, meaning = (text.replace("|", "\\|") for text in parameter.get_help_record(context) or ("", ""))
    return f"| `{names}` | {meaning} |"


if __name__ == "__main__":
    main()
