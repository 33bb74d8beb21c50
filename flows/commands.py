"""The commands `bessemer run`, `plan`, `status` and `rank export`."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from flows import environment, graph, records
from flows.graph import Graph
from tasks.common import params_file
from tasks.common.harness.launch import check_device_count
from tasks.common.harness.records import commit
from tasks.common.model_graph import entries_of
from tasks.common.raw_params import read_params
from tasks.common.settings import ENTRY_STAGES, STAGES, BessemerError, Numerics

if TYPE_CHECKING:
    from rich.console import Console

    from flows.terminal import Terminal

PROVENANCE = Path("data/package/provenance.json")
SCORECARD_STAGE = "compare"  # the stage that writes the scorecard
ROUTES = {"chat": "POST /generate, OpenAI's /v1", "encoder": "POST /fill-mask", "classifier": "POST /classify"}
NEXT_COMMANDS = (
    ("bessemer status", "stages, model tag and gates"),
    ("bessemer ui", "Prefect's page with every run, its graph and lineage"),
)


def run(project: Path, names: Sequence[str]) -> None:
    """Bring all stages, or `names` and their dependencies, up to date; raise BessemerError if one fails."""
    params = read_params(project / "params.yaml")
    stages = _select_stages(project, names, params)
    from flows import terminal

    out = terminal.console()
    if not any(stage.dirty for stage in stages.values()):
        out.print(f"Nothing has changed: all {len(stages)} stages are up to date{_model_text(project)}.")
        if "package" in stages:
            _build_bento(out, project)
        terminal.show_commands(out, _next_commands(project))
        return
    numerics = Numerics.model_validate(params["numerics"])
    check_device_count(numerics.parallel.processes, numerics.device)
    terminal.show_plan(out, project, stages)
    environment.prepare(project, console=False)
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    with terminal.Terminal(out) as watcher:
        state = _run_flow(project, names, watcher)
    terminal.show_seconds(out, watcher.outcomes)
    scorecard_is_new = (
        SCORECARD_STAGE in watcher.outcomes and watcher.outcomes[SCORECARD_STAGE].done
    )  # else it is an earlier run's
    report = project / "runs" / watcher.run_id / "report.html"
    terminal.show_pages(out, project, report, compared=scorecard_is_new)
    if state.is_failed() or state.is_crashed():
        known = dict.fromkeys((*stages, *watcher.outcomes))  # the build of the Bento is not a DVC stage
        unfinished = [name for name in known if name not in watcher.outcomes or not watcher.outcomes[name].done]
        unfinished_text = f"Not done: {', '.join(unfinished)}. " if unfinished else ""
        raise BessemerError(f"{state.message}\n{unfinished_text}`bessemer run` continues from here.")
    if state.is_cancelled():
        raise BessemerError(str(state.message))
    if scorecard_is_new and records.scorecard_rows(project):
        terminal.show_scorecard(out, project)
    terminal.show_commands(out, _next_commands(project))


def _select_stages(project: Path, names: Sequence[str], params: dict[str, Any]) -> Graph:
    """Return the named stages and their dependencies; raise SettingsError if one cannot run with these settings.

    Only the stages that would run are checked, because the others' results may be from earlier, valid settings. Files
    of all stages are checked before DVC is asked, which takes seconds: a stage without one of its files is due anyway.
    """
    params_file.check(params, files_of=() if names else _stage_names(params))
    stages = graph.select(graph.read(project), names)
    params_file.check(params, stages=[name for name, stage in stages.items() if stage.dirty])
    return stages


def _stage_names(params: Mapping[str, Any]) -> list[str]:
    """Return the names of all stages that settings describe: `ingest`, `finetune@chat`, ..."""
    single = [stage for stage in STAGES if stage not in ENTRY_STAGES]
    return [*single, *(f"{stage}@{key}" for stage in ENTRY_STAGES for key in entries_of(params, stage))]


def _build_bento(out: "Console", project: Path) -> None:
    """Build the Bento of the packaged model if it is missing: its build failed, or the service has changed."""
    if not (project / PROVENANCE).is_file():
        return
    from serving.build import build

    built = build(project / PROVENANCE.parent, project)
    if built.created:
        out.print(f"Built its missing Bento: {built.tag}.")


def _run_flow(project: Path, names: Sequence[str], watcher: "Terminal") -> Any:
    """Run the Prefect flow in this process and return its final state."""
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
    stages = _select_stages(project, names, read_params(project / "params.yaml"))
    from flows import terminal

    out = terminal.console()
    if any(stage.dirty for stage in stages.values()):
        terminal.show_plan(out, project, stages)
    else:
        out.print(f"Nothing to do: all {len(stages)} stages are up to date{_model_text(project)}.")


def status(project: Path) -> None:
    """Print the state of every stage, its last run, the packaged model and the gates."""
    from flows import terminal

    stages = graph.read(project)
    out = terminal.console()
    terminal.show_status(out, project, stages)
    out.print(f"{_stages_text(stages)}{_model_text(project)}.")
    _show_pending_rankings(out, project)
    if records.scorecard_rows(project):
        if SCORECARD_STAGE in graph.affected(stages):
            out.print("These are figures of an earlier run; `bessemer plan` shows what has changed since.")
        terminal.show_scorecard(out, project)


def export_rankings(project: Path) -> None:
    """Export people's new rankings to a file, and print the next commands."""
    from flows import rankings, terminal

    out = terminal.console()
    found = rankings.export(project)
    if found is None:
        rejected = rankings.count_pending(project).rejected
        out.print(
            f"No new rankings to export{_rejected_text(rejected)}. `bessemer rank` shows the page to rank answers."
        )
        return
    name = found.path.relative_to(project)
    out.print(f"{_rankings_text(found.rankings)} written to {name}{_rejected_text(found.rejected)}.")
    steps = [("bessemer run", "train the reward model on them, and rerun the stages after it")]
    if commit()["commit"]:
        steps.insert(0, (f"git add {name} && git commit -m 'Rankings'", "commit them, like the rest of data/sources"))
    terminal.show_commands(out, steps)


def _show_pending_rankings(out: "Console", project: Path) -> None:
    """Print how many rankings wait to be exported, if there are any."""
    from flows import rankings

    found = rankings.count_pending(project)
    if found.rankings or found.rejected:
        verb = "waits" if found.rankings == 1 else "wait"
        out.print(
            f"{_rankings_text(found.rankings)} {verb} for `bessemer rank export`{_rejected_text(found.rejected)}."
        )


def _rankings_text(rankings: int) -> str:
    return f"{rankings} new ranking{'s' * (rankings != 1)}"


def _rejected_text(reasons: Mapping[str, int]) -> str:
    details = "; ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return f"; {sum(reasons.values())} not exported ({details})" if reasons else ""


def _next_commands(project: Path) -> Sequence[tuple[str, str]]:
    """Return what can be done next: no chat with a package that has no chat model, and only the routes it answers."""
    contents = (records.read_json(project / PROVENANCE) or {}).get("contents", ("chat",))
    routes = [route for part, route in ROUTES.items() if part in contents]
    served = f"serve on http://localhost:3000 ({', '.join([*routes, 'GET /provenance'])})"
    chat = (("bessemer chat", "chat with the model"),) if "chat" in contents else ()
    return (*chat, ("bessemer serve", served), *NEXT_COMMANDS)


def _stages_text(stages: Graph) -> str:
    dirty = sum(stage.dirty for stage in stages.values())
    return f"{len(stages) - dirty} of {len(stages)} stages are up to date"


def _model_text(project: Path) -> str:
    provenance = records.read_json(project / PROVENANCE)
    return f"; the packaged model is {provenance['model']}" if provenance else "; no model has been packaged yet"


def _exit_on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    """Exit normally, so that Prefect's temporary server is stopped too."""
    sys.exit(128 + number)
