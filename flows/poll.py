"""The flow that looks whether enough people's rankings have come, and if so makes the next model from them.

A schedule calls it every few minutes (`rankings/poll` in `prefect.yaml`); where too few wait it ends at once. Otherwise
it freezes them into a file, commits that file, and runs the chain as the scheduled deployment does. A run that was
cancelled or killed is taken up by the next call, because what it owes is noted first and crossed out last.
"""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import rankings, workplace
from flows.pipeline import chain
from flows.records import read_json
from serving.errors import ServingError
from tasks.common import settings
from tasks.common.settings import BessemerError, read_params
from tasks.common.stage import write_json

DUE = Path(".bessemer/rankings-due.json")


@flow(name="rankings", persist_result=False)
def poll(project: str = ".", worktree: bool = True) -> State[Any]:
    """Export the rankings and run the chain where at least `placement.enough_rankings` wait."""
    home = Path(project)
    params = read_params(home / "params.yaml")
    settings.check(params)
    enough = int(params["placement"]["enough_rankings"])
    found = rankings.waiting(home).rankings
    due = home / DUE
    if found < enough and not due.exists():
        return Completed(name="UpToDate", message=f"{found} new rankings wait; {enough} start a run.")
    log = get_run_logger()
    write_json(due, {"rankings": found, **(read_json(due) or {})})
    try:
        while export := rankings.export(home):
            log.info("%d rankings written to %s", export.rankings, export.path)
        if worktree:
            workplace.commit(home, rankings.exported(home), "New rankings by people")
    except (BessemerError, ServingError) as error:
        return Failed(message=f"{error} The next poll tries again.")
    state = chain(project=project, worktree=worktree, return_state=True)
    if state.is_completed() or state.is_failed():  # else it was stopped, and is still owed
        due.unlink()
    return State(type=state.type, name=state.name, message=state.message)
