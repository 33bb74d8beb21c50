"""The flow `rankings`: retrain automatically when there are enough new rankings by people.

A schedule calls it every few minutes (`rankings/poll` in `prefect.yaml`). If there are too few new rankings, it ends at
once. Otherwise it exports them to a file, commits that file, and runs the pipeline as the scheduled deployment does. A
file marks the pending run until it has ended, so the next call retries a run that was cancelled or killed.
"""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import rankings
from flows import worktree as git_worktree
from flows.pipeline import chain
from flows.records import read_json
from serving.errors import ServingError
from tasks.common import params_file
from tasks.common.harness.records import write_json
from tasks.common.raw_params import read_params
from tasks.common.settings import BessemerError, Placement

PENDING_RUN = Path(".bessemer/rankings-due.json")


@flow(name="rankings", persist_result=False)
def poll(project: str = ".", worktree: bool = True) -> State[Any]:
    """Export the rankings and run the pipeline if there are at least `placement.min_new_rankings` new ones."""
    home = Path(project)
    params = read_params(home / "params.yaml")
    params_file.check(params)
    min_rankings = Placement.model_validate(params["placement"]).min_new_rankings
    pending = rankings.count_pending(home).rankings
    pending_run = home / PENDING_RUN
    if pending < min_rankings and not pending_run.exists():
        return Completed(name="UpToDate", message=f"{pending} new rankings; a run starts at {min_rankings}.")
    log = get_run_logger()
    write_json(pending_run, {"rankings": pending, **(read_json(pending_run) or {})})
    try:
        while export := rankings.export(home):
            log.info("%d rankings written to %s", export.rankings, export.path)
        if worktree:
            git_worktree.commit(home, rankings.exported_files(home), "New rankings by people")
    except (BessemerError, ServingError) as error:
        return Failed(message=f"{error} The next poll tries again.")
    state = chain(project=project, worktree=worktree, return_state=True)
    if state.is_completed() or state.is_failed():  # otherwise it was stopped and stays pending
        pending_run.unlink()
    return State(type=state.type, name=state.name, message=state.message)
