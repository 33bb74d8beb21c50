"""The Prefect flow: one task run per DVC stage, in topological order, independent stages in parallel.

DVC alone decides what is up to date. The flow starts each stage when its dependencies are done, follows it while it
runs and records its outcome. `bessemer run` calls this flow in its own process; a work pool's worker runs the
deployment in `prefect.yaml`.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed

from flows import artifacts, graph, records
from flows import worktree as git_worktree
from flows.graph import Graph
from flows.records import Outcome
from flows.run import Run


@flow(name="bessemer", flow_run_name=records.new_run_id, persist_result=False)
def chain(project: str = ".", stages: list[str] | None = None, worktree: bool = False) -> State[Any]:
    """Run all stages (or `stages` and their dependencies) that are not up to date, build the Bento and the report."""
    run_id = runtime.flow_run.name
    with git_worktree.workdir(Path(project), run_id, worktree=worktree) as workdir, Run(run_id, workdir) as run:
        plan = graph.select(graph.read(workdir), stages or [])
        if worktree:  # otherwise `bessemer run` has checked
            git_worktree.check(workdir, [name for name in plan if plan[name].dirty])
        run_stages(run, plan)
        records.write_flow(workdir, run_id, run.outcomes)
        report(run.quoted, return_state=True)  # a failed report does not fail the run
        artifacts.publish(workdir, plan, run.outcomes, run_id)
        run.watcher.on_run_end(run_id, run.outcomes)
        return final_state(run.outcomes, plan)


@task(persist_result=False, cache_policy=NO_CACHE)
def stage(run: Run, name: str) -> State[Any]:
    """Run one stage unless it is up to date."""
    reasons = graph.reasons(run.workdir, name)
    if not reasons:
        run.record_outcome(name, Outcome("up to date"))
        return Completed(name="UpToDate", message="No dependency has changed.")
    return run.run_stage(name, reasons)


@task(name="build", task_run_name="build", persist_result=False, cache_policy=NO_CACHE)
def build(run: Run) -> State[Any]:
    """Build the Bento of the package, unless it exists: DVC may have restored the package from its cache."""
    from serving.build import build as make
    from serving.errors import ServingError

    started = time.perf_counter()
    run.watcher.on_stage_start("build", ("a packaged model",))
    try:
        built = make(run.workdir / "data" / "package", run.workdir)
    except ServingError as error:
        run.record_outcome("build", Outcome("failed", time.perf_counter() - started, f"build: {error}"))
        return Failed(message=str(error))
    get_run_logger().info("%s is in %s", built.tag, built.path)
    run.watcher.on_line("build", built.tag)
    run.record_outcome("build", Outcome("ran" if built.created else "up to date", time.perf_counter() - started))
    return Completed(message=built.tag) if built.created else Completed(name="UpToDate", message=built.tag)


@task(name="report", task_run_name="report", persist_result=False, cache_policy=NO_CACHE)
def report(run: Run) -> None:
    """Write the run report, also of a failed run."""
    from flows.report.page import write_report

    get_run_logger().info("The report is %s", write_report(run.workdir, run.id).resolve())


def run_stages(run: Run, plan: Graph) -> None:
    """Start each stage when its dependencies are done, at most `max_parallel_stages` at a time, critical path first."""
    logs = records.last_logs(run.workdir)
    path_seconds = graph.critical_path(plan, lambda name: float(logs.get(name, {}).get("seconds", 1.0)))
    waiting, running = sorted(plan, key=lambda name: -path_seconds[name]), 0
    futures: dict[str, PrefectFuture[Any]] = {}
    ended: SimpleQueue[str] = SimpleQueue()

    def start(name: str) -> None:
        stage_task = stage.with_options(name=name, task_run_name=name)
        needs = [futures[need] for need in plan[name].needs]  # the edges of the run's graph in the UI
        futures[name] = stage_task.submit(run.quoted, name, return_state=False, wait_for=needs)
        futures[name].add_done_callback(lambda _: ended.put(name))

    while True:
        ready = [name for name in waiting if all(run.done(need) for need in plan[name].needs)]
        for name in ready[: run.max_parallel_stages - running]:
            start(name)
            waiting.remove(name)
            running += 1
        if not running:
            break
        name = ended.get()
        run.record_crash(name, futures[name].state)
        running -= 1
    if "package" in plan and run.done("package"):
        state = build(run.quoted, return_state=True, wait_for=[futures["package"]])
        run.record_crash("build", state)


def final_state(outcomes: Mapping[str, Outcome], plan: Graph) -> State[Any]:
    """Return the final state of the run: failed, cancelled or completed."""
    failed = [outcome.message for outcome in outcomes.values() if outcome.status == "failed"]
    if failed:
        return Failed(message="\n".join(failed))
    if any(name not in outcomes or not outcomes[name].done for name in plan):
        return Cancelled(
            message="The run was stopped before its end; the next one continues from the last complete stage."
        )
    done = [outcomes[name].status for name in plan]
    return Completed(
        message=f"{len(done) - done.count('up to date')} stages ran, {done.count('up to date')} were up to date."
    )
