"""`bessemer run`, `plan`, `status` and `rank export`: what is to be done, doing it, and what came of it."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from flows import environment, graph, records
from flows.graph import Graph
from tasks.common import settings
from tasks.common.settings import BessemerError, read_params
from tasks.common.stage import commit, must_find_devices

if TYPE_CHECKING:
    from rich.console import Console

    from flows.terminal import Terminal

PROVENANCE = Path("data/package/provenance.json")
JOINED = "compare"  # the stage whose figures the sheet shows
NEXT = (
    ("bessemer chat", "talk to the model"),
    ("bessemer serve", "answer on http://localhost:3000 (POST /generate, OpenAI's /v1, GET /provenance)"),
    ("bessemer status", "stages, model tag and gates"),
    ("bessemer ui", "Prefect's page with every run, its graph and lineage"),
)


def run(project: Path, names: Sequence[str]) -> None:
    """Bring the chain (or `names` and what they need) up to date; raise BessemerError where that fails."""
    params = read_params(project / "params.yaml")
    stages = _selected(project, names, params)
    from flows import terminal

    out = terminal.console()
    if not any(stage.dirty for stage in stages.values()):
        out.print(f"Nothing has changed: all {len(stages)} stages are up to date{_model(project)}.")
        if "package" in stages:
            _build(out, project)
        terminal.show_commands(out, NEXT)
        return
    numerics = params["numerics"]
    must_find_devices(numerics["parallel"]["processes"], numerics["device"])
    terminal.show_plan(out, project, stages)
    environment.prepare(project, console=False)
    signal.signal(signal.SIGTERM, _terminated)
    with terminal.Terminal(out) as watcher:
        state = _flow(project, names, watcher)
    terminal.show_seconds(out, watcher.outcomes)
    compared = JOINED in watcher.outcomes and watcher.outcomes[JOINED].done  # else it is an earlier run's
    report = project / "runs" / watcher.run_id / "report.html"
    terminal.show_pages(out, project, report, compared=compared)
    if state.is_failed() or state.is_crashed():
        known = dict.fromkeys((*stages, *watcher.outcomes))  # the Bento's build is no stage
        left = [name for name in known if name not in watcher.outcomes or not watcher.outcomes[name].done]
        told = f"Not done: {', '.join(left)}. " if left else ""
        raise BessemerError(f"{state.message}\n{told}`bessemer run` goes on from here.")
    if state.is_cancelled():
        raise BessemerError(str(state.message))
    if compared and records.rows(project):
        terminal.show_sheet(out, project)
    terminal.show_commands(out, NEXT)


def _selected(project: Path, names: Sequence[str], params: dict[str, Any]) -> Graph:
    """Return the stages that `names` and what they need are; raise SettingsError where the settings keep one from it.

    Asked are those that would run: a model that answers may lie there from before a classifier was asked for.
    """
    settings.check(params)
    stages = graph.select(graph.read(project), names)
    settings.check(params, stages=[name for name, stage in stages.items() if stage.dirty])
    return stages


def _build(out: "Console", project: Path) -> None:
    """Make the Bento of the packaged model where there is none: its build failed, or the service has changed."""
    if not (project / PROVENANCE).is_file():
        return
    from serving.build import build

    built = build(project / PROVENANCE.parent, project)
    if built.made:
        out.print(f"Its Bento was missing and is made now: {built.tag}.")


def _flow(project: Path, names: Sequence[str], watcher: "Terminal") -> Any:
    """Call the Prefect flow in this process and return its final state."""
    address = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    watcher.out.print(f"[dim]Watch it at {address}[/]" if address else "[dim]Starting Prefect ...[/]")
    environment.connect()
    from flows import watch
    from flows.pipeline import chain

    token = watch.WATCHER.set(watcher)
    try:
        return chain(project=str(project), stages=list(names) or None, return_state=True)
    finally:
        watch.WATCHER.reset(token)


def plan(project: Path, names: Sequence[str]) -> None:
    """Print what `run` would do."""
    stages = _selected(project, names, read_params(project / "params.yaml"))
    from flows import terminal

    out = terminal.console()
    if any(stage.dirty for stage in stages.values()):
        terminal.show_plan(out, project, stages)
    else:
        out.print(f"Nothing to do: all {len(stages)} stages are up to date{_model(project)}.")


def status(project: Path) -> None:
    """Print the state of every stage, its last run, the packaged model and the gates."""
    from flows import terminal

    stages = graph.read(project)
    out = terminal.console()
    terminal.show_status(out, project, stages)
    out.print(f"{_count(stages)}{_model(project)}.")
    _tell_rankings(out, project)
    if records.rows(project):
        if JOINED in graph.affected(stages):
            out.print("These are figures of an earlier run; `bessemer plan` says what has changed since.")
        terminal.show_sheet(out, project)


def export_rankings(project: Path) -> None:
    """Freeze people's new rankings into a file, and say what to do with it."""
    from flows import rankings, terminal

    out = terminal.console()
    found = rankings.export(project)
    if found is None:
        left = rankings.waiting(project).left_out
        out.print(f"No new rankings: nothing to export{_left_out(left)}. `bessemer rank` shows the page to make some.")
        return
    name = found.path.relative_to(project)
    out.print(f"{_number(found.rankings)} written to {name}{_left_out(found.left_out)}.")
    steps = [("bessemer run", "train the reward model and what follows with them")]
    if commit()["commit"]:
        steps.insert(0, (f"git add {name} && git commit -m 'Rankings'", "keep them, as all of data/sources is kept"))
    terminal.show_commands(out, steps)


def _tell_rankings(out: "Console", project: Path) -> None:
    """Say how many rankings wait to be exported, where anybody has made some."""
    from flows import rankings

    found = rankings.waiting(project)
    if found.rankings or found.left_out:
        verb = "waits" if found.rankings == 1 else "wait"
        out.print(f"{_number(found.rankings)} {verb} for `bessemer rank export`{_left_out(found.left_out)}.")


def _number(rankings: int) -> str:
    return f"{rankings} new ranking{'s' * (rankings != 1)}"


def _left_out(reasons: Mapping[str, int]) -> str:
    told = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return f"; {sum(reasons.values())} left out ({told})" if reasons else ""


def _count(stages: Graph) -> str:
    dirty = sum(stage.dirty for stage in stages.values())
    return f"{len(stages) - dirty} of {len(stages)} stages are up to date"


def _model(project: Path) -> str:
    provenance = records.read_json(project / PROVENANCE)
    return f"; the packaged model is {provenance['model']}" if provenance else "; no model has been packaged yet"


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End as an ordinary exit does, so that Prefect's temporary server is ended too."""
    sys.exit(128 + number)
