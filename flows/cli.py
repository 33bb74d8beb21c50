"""The command line, `bessemer`. Commands parse their arguments and import what they call only when they run."""

import os
import sys
from pathlib import Path

import click

from flows.start.cli import init
from serving.errors import ServingError
from tasks.common import proxies
from tasks.common.settings import BessemerError

PORT_RANGE = click.IntRange(1, 65535)
STAGES_OPTION = click.option(
    "--stage", "-s", "stages", multiple=True, metavar="NAME",
    help="Only this stage and its dependencies; may be repeated.",
)  # fmt: skip

HOST_OPTION = click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all."
)
PORT_OPTION = click.option("--port", "-p", default=3000, type=PORT_RANGE, show_default=True, help="Port to listen on.")
WITH_OPTION = click.option(
    "--with", "-w", "others", multiple=True, metavar="NAME",
    help="Also serve this model: an entry of evaluate, or the model of a stage (finetune@chat); may be repeated.",
)  # fmt: skip


def main() -> None:
    """Entry point. An error that the user can fix is one message and exit code 1, without a traceback."""
    proxies.exempt_loopback()
    try:
        _use_project_code()
        cli(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nStopped. No partial results were kept; the next run continues from here.", err=True)
        sys.exit(130)
    except (BessemerError, ServingError) as error:
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        sys.exit(1)


def _use_project_code() -> None:
    """Hand over to the code of the project that this command was called in, if it has its own."""
    from flows.own_code import use_project_code

    project = nearest_project(Path.cwd())
    if project and sys.argv[1:2] != ["init"]:
        use_project_code(project)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.pass_context
def cli(context: click.Context) -> None:
    """Train a language model from raw text and serve it, reproducibly from data hash to answer.

    \b
    bessemer init      create a project from a checkpoint, texts, conversations, preferences or labels
    bessemer run       train or update the model; only changed stages run
    bessemer chat      chat with it
    bessemer serve     serve it on http://localhost:3000
    bessemer rank      let people rank its answers there, as training data for the next run
    """
    if context.invoked_subcommand == "init":  # the one command outside a project
        return
    os.chdir(project_root(Path.cwd()))


def project_root(start: Path) -> Path:
    """Return the project folder around a folder; raise BessemerError if there is none."""
    project = nearest_project(start)
    if project is None:
        raise BessemerError(
            f"{start} is not inside a project (no dvc.yaml here or above): change to the project folder, or create one "
            "with `bessemer init`."
        )
    return project


def nearest_project(start: Path) -> Path | None:
    """Return the nearest folder upwards that contains a dvc.yaml; None if there is none."""
    return next((folder for folder in (start, *start.parents) if (folder / "dvc.yaml").is_file()), None)


@cli.command()
@STAGES_OPTION
def run(stages: tuple[str, ...]) -> None:
    """Run every stage whose code, settings, packages or inputs have changed, then build the Bento and the report.

    \b
    Examples:
      bessemer run                        the whole pipeline
      bessemer run -s finetune            up to all fine-tuned models; `-s finetune@chat` for one
      bessemer run -s reward              all reward models
    """
    from flows import commands

    commands.run(Path(), stages)


@cli.command()
@STAGES_OPTION
def plan(stages: tuple[str, ...]) -> None:
    """Print which stages would run, why, and how long they took when they last ran.

    \b
    Examples:
      bessemer plan
      bessemer plan -s align
    """
    from flows import commands

    commands.plan(Path(), stages)


@cli.command()
def status() -> None:
    """Print every stage's state and last run, the packaged model and the gates.

    \b
    Example:
      bessemer status
    """
    from flows import commands

    commands.status(Path())


@cli.command()
@click.argument("sections", nargs=-1, metavar="[SECTION]...")
@click.option("--json", "as_json", is_flag=True, help="Print values and origins as JSON.")
@click.option("--diff", "only_different", is_flag=True, help="Only settings that differ from the defaults.")
@click.option("--markdown", is_flag=True, help="The reference of all settings: types, defaults, bounds, descriptions.")
def params(sections: tuple[str, ...], as_json: bool, only_different: bool, markdown: bool) -> None:
    """Print every setting in effect and where its value comes from: params.yaml, or the default of a class.

    \b
    Examples:
      bessemer params                         all settings
      bessemer params finetune numerics       these sections
      bessemer params finetune.chat.task      one group of an entry
      bessemer params --diff                  where params.yaml differs from the defaults
      bessemer params --markdown              docs/reference/settings.md, as `make docs` writes it
    """
    if markdown:
        from flows.settings_reference import markdown as reference

        click.echo(reference(), nl=False)
        return
    from flows import params as listing

    if as_json:
        click.echo(listing.as_json(Path(), sections, only_different=only_different))
    else:
        from flows import terminal

        listing.show(terminal.console(), Path(), sections, only_different=only_different)


@cli.command()
@click.argument("name", required=False)
def profile(name: str | None) -> None:
    """Write params.yaml from the profile NAME, or list the profiles and mark the current one.

    \b
    Examples:
      bessemer profile            list the profiles
      bessemer profile smoke      the whole pipeline in about two minutes, on a small table of facts
      bessemer profile default    back to the default
    """
    from flows import profiles

    if name is None:
        current = profiles.current(Path())
        for known in profiles.names(Path()):
            click.echo(f"{'*' if known == current else ' '} {known:12} {profiles.describe(Path(), known)}")
        if current is None:
            click.echo("params.yaml matches no profile: it was edited.")
        return
    backup = profiles.use(Path(), name)
    click.echo(f"params.yaml is now the profile {name}.")
    if backup:
        click.echo(f"The previous params.yaml matched no profile; it was saved as {backup}.")


@cli.command()
def build() -> None:
    """Build the Bento of the packaged model, unless it exists already.

    \b
    Example:
      bessemer build && bentoml list
    """
    from serving import build

    built = build.build()
    click.echo(f"{built.tag} ({'built' if built.created else 'exists already'}): {built.path}")


@cli.command()
@HOST_OPTION
@PORT_OPTION
@WITH_OPTION
@click.option(
    "--allow-origin", "origins", multiple=True, metavar="ORIGIN",
    help="Let the pages of this site use the endpoint, e.g. https://chat.example.org, or * for all; may be repeated.",
)  # fmt: skip
def serve(host: str, port: int, others: tuple[str, ...], origins: tuple[str, ...]) -> None:
    """Start the endpoint: POST /generate, /fill-mask, /classify, OpenAI's /v1, GET /provenance, pages at / and /rank.

    \b
    Examples:
      bessemer serve
      bessemer serve --port 8000
      bessemer serve --with tuned --with base     a request with "model": "base" then uses the base model
      curl localhost:3000/generate -H 'content-type: application/json' -d '{"input": "Hello!"}'
    """
    from flows import endpoint

    endpoint.serve(Path(), host, port, others, origins=origins)


@cli.group(invoke_without_command=True)
@HOST_OPTION
@PORT_OPTION
@WITH_OPTION
@click.pass_context
def rank(context: click.Context, host: str, port: int, others: tuple[str, ...]) -> None:
    """Let people rank answers at /rank: start the endpoint unless it runs already, and print the page's address.

    \b
    Examples:
      bessemer rank                               several answers of the packaged model
      bessemer rank --with tuned --with base      answers of three models, shown without their names
      bessemer rank --host 0.0.0.0                for people on other machines
      bessemer rank export                        write the rankings to a file for the next run
    """
    if context.invoked_subcommand is None:
        from flows import endpoint

        endpoint.rank(Path(), host, port, others)


@rank.command()
def export() -> None:
    """Write the new rankings to the next file in data/sources/rankings/.

    Rankings with a flagged answer and those that `validate` would reject are not exported; none is exported twice.

    \b
    Example:
      bessemer rank export && bessemer run
    """
    from flows import commands

    commands.export_rankings(Path())


@cli.command()
@click.argument("question", nargs=-1)
@click.option("--samples", is_flag=True, help="Ask a few questions of the project's own data and exit.")
@click.option(
    "--with", "-w", "name", metavar="NAME",
    help="Chat with another model: an entry of evaluate, or the model of a stage (finetune@chat).",
)  # fmt: skip
def chat(question: tuple[str, ...], samples: bool, name: str | None) -> None:
    """Chat with the packaged model, or ask it one QUESTION.

    \b
    Examples:
      bessemer chat
      bessemer chat What can you do?
      bessemer chat --with finetune@chat
      bessemer chat --samples
    """
    from flows import endpoint

    endpoint.chat(Path(), None if samples else " ".join(question), name)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows of the scorecard as JSON.")
def report(as_json: bool) -> None:
    """Write the report page of the last run and print its scorecard: every model and how it was made.

    \b
    Examples:
      bessemer report
      bessemer report --json
    """
    from flows import records

    if as_json:
        import json

        click.echo(json.dumps(records.scorecard_rows(Path()), indent=1))
    else:
        from flows import terminal
        from flows.report.page import write_last_report

        path = write_last_report(Path())
        out = terminal.console()
        terminal.show_scorecard(out, Path())
        terminal.show_pages(out, Path(), path)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=4200, type=PORT_RANGE, show_default=True, help="Port to listen on.")
def ui(host: str, port: int) -> None:
    """Start Prefect's server with its web page: runs, their graphs, logs and artifacts.

    \b
    Examples:
      bessemer ui                 http://localhost:4200
      bessemer ui --port 4300
    """
    from flows import server

    server.serve_ui(Path(), host, port)


@cli.command()
def doctor() -> None:
    """Check this machine and folder. Each line is ok, a note, or a problem with its remedy (then the exit code is 1).

    \b
    Example:
      bessemer doctor
    """
    from flows import doctor

    findings = list(doctor.examine(Path()))
    for finding in findings:
        mark, colour = ("note", "cyan") if finding.note else ("ok  ", "green") if finding.good else ("fix ", "yellow")
        click.echo(f"{click.style(mark, fg=colour)} {finding.text}")
    sys.exit(0 if all(finding.good for finding in findings) else 1)


cli.add_command(init)

if __name__ == "__main__":
    main()
