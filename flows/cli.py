"""The command line, `bessemer`. Commands only parse and call: what they do is imported when they are called."""

import os
import sys
from pathlib import Path

import click

from serving.errors import ServingError
from tasks.common.settings import BessemerError

SAMPLES = ("What is the capital of Peru?", "What is the capital of Germany?", "What is the symbol of gold?")
PORT = click.IntRange(1, 65535)
STAGES = click.option(
    "--stage", "-s", "stages", multiple=True, metavar="NAME", help="Only this stage and what it needs; may be repeated."
)

HOST = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
ENDPOINT = click.option("--port", "-p", default=3000, type=PORT, show_default=True, help="Port to listen on.")
BESIDE = click.option(
    "--with", "-w", "others", multiple=True, metavar="NAME",
    help="Another model of the chain to answer too: base, tuned, policy or pruned; may be repeated.",
)  # fmt: skip


def main() -> None:
    """Entry point: a failure that is the user's to mend is one message and exit code 1, without a traceback."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nStopped. Nothing half-written was kept; the next run goes on from here.", err=True)
        sys.exit(130)
    except (BessemerError, ServingError) as error:
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """From raw text to a language model on an endpoint, reproducible from data hash to answer.

    \b
    bessemer run       make or update the model: only what has changed is done
    bessemer chat      talk to it
    bessemer serve     answer on http://localhost:3000
    bessemer rank      let people rank its answers there, for the next run to learn from
    """
    os.chdir(home(Path.cwd()))


def home(start: Path) -> Path:
    """Return the project's folder: the nearest one upwards that holds a dvc.yaml."""
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise BessemerError(f"{start} lies in no project (no dvc.yaml here or above): go to the project's folder first.")


@cli.command()
@STAGES
def run(stages: tuple[str, ...]) -> None:
    """Run every stage whose code, settings, packages or inputs have changed, then build and report.

    \b
    Examples:
      bessemer run                        the whole chain
      bessemer run -s finetune            up to the tuned model
      bessemer run -s reward              both reward models; `-s reward@policy` for one
    """
    from flows import commands

    commands.run(Path(), stages)


@cli.command()
@STAGES
def plan(stages: tuple[str, ...]) -> None:
    """Say what would run, why, and about how long it took when it last ran.

    \b
    Examples:
      bessemer plan
      bessemer plan -s ppo
    """
    from flows import commands

    commands.plan(Path(), stages)


@cli.command()
def status() -> None:
    """Show every stage's state and last run, the packaged model and the gates.

    \b
    Example:
      bessemer status
    """
    from flows import commands

    commands.status(Path())


@cli.command()
@click.argument("name", required=False)
def profile(name: str | None) -> None:
    """Write params.yaml from the profile NAME, or list the profiles and say which is in force.

    \b
    Examples:
      bessemer profile            what there is
      bessemer profile smoke      the whole chain in about two minutes, on a small table of facts
      bessemer profile default    back to the default
    """
    from flows import profiles

    if name is None:
        current = profiles.in_force(Path())
        for known in profiles.names(Path()):
            click.echo(f"{'*' if known == current else ' '} {known:12} {profiles.describe(Path(), known)}")
        if current is None:
            click.echo("params.yaml is none of these: it was changed by hand.")
        return
    kept = profiles.use(Path(), name)
    click.echo(f"params.yaml is now the profile {name}.")
    if kept:
        click.echo(f"What stood in it before was no profile; it is kept as {kept}.")


@cli.command()
def build() -> None:
    """Build the Bento from the packaged model; where it exists already, nothing is done.

    \b
    Example:
      bessemer build && bentoml list
    """
    from serving import build

    built = build.build()
    click.echo(f"{built.tag} ({'made' if built.made else 'there already'}): {built.path}")


@cli.command()
@HOST
@ENDPOINT
@BESIDE
def serve(host: str, port: int, others: tuple[str, ...]) -> None:
    """Answer on a port: POST /generate, POST /fill-mask, OpenAI's /v1, GET /provenance, pages at / and /rank.

    \b
    Examples:
      bessemer serve
      bessemer serve --port 8000
      bessemer serve --with tuned --with base     "model": "tuned" in a request then asks the tuned model
      curl localhost:3000/generate -H 'content-type: application/json' -d '{"input": "What is the capital of Peru?"}'
    """
    from flows import endpoint

    endpoint.serve(Path(), host, port, others)


@cli.group(invoke_without_command=True)
@HOST
@ENDPOINT
@BESIDE
@click.pass_context
def rank(context: click.Context, host: str, port: int, others: tuple[str, ...]) -> None:
    """Let people rank answers at /rank: start the endpoint where none runs yet, and say where the page is.

    \b
    Examples:
      bessemer rank                               several answers of the packaged model
      bessemer rank --with tuned --with base      answers of three models, which the page does not name
      bessemer rank --host 0.0.0.0                for people on other machines
      bessemer rank export                        what they said, as a file for the next run
    """
    if context.invoked_subcommand is None:
        from flows import endpoint

        endpoint.rank(Path(), host, port, others)


@rank.command()
def export() -> None:
    """Freeze the rankings that are new into the next file of data/sources/rankings/.

    Those with a flagged answer and what `validate` would refuse are left out; none is exported twice.

    \b
    Example:
      bessemer rank export && bessemer run
    """
    from flows import commands

    commands.export_rankings(Path())


@cli.command()
@click.argument("question", nargs=-1)
@click.option("--samples", is_flag=True, help="Ask a few questions and leave.")
def chat(question: tuple[str, ...], samples: bool) -> None:
    """Talk to the packaged model, or ask it one QUESTION.

    \b
    Examples:
      bessemer chat
      bessemer chat What is the capital of Peru?
      bessemer chat --samples
    """
    from serving import chat

    if samples:
        for line in SAMPLES:
            click.echo(f"> {line}")
            chat.chat(question=line)
    else:
        sys.exit(chat.chat(question=" ".join(question) or None))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="The rows as JSON, for other programs.")
def report(as_json: bool) -> None:
    """Write the page of the last run and show its table: every model of the chain, and how it was made.

    \b
    Examples:
      bessemer report
      bessemer report --json
    """
    from flows import records

    if as_json:
        import json

        click.echo(json.dumps(records.rows(Path()), indent=1))
    else:
        from flows import terminal
        from flows.report import write_last_report

        path = write_last_report(Path())
        out = terminal.console()
        terminal.show_sheet(out, Path())
        terminal.show_pages(out, Path(), path)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=4200, type=PORT, show_default=True, help="Port to listen on.")
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
    """Examine this machine and folder; every line is good, a note, or says what to do (then the exit code is 1).

    \b
    Example:
      bessemer doctor
    """
    from flows import doctor

    findings = list(doctor.examine(Path()))
    for finding in findings:
        mark, colour = ("note", "cyan") if finding.note else ("ok  ", "green") if finding.good else ("look", "yellow")
        click.echo(f"{click.style(mark, fg=colour)} {finding.text}")
    sys.exit(0 if all(finding.good for finding in findings) else 1)
