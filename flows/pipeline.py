"""The flow: one task run a DVC stage, in DVC's order, independent stages side by side.

DVC alone decides what is up to date; here each stage is started when those it needs are done, followed while it runs,
and told of afterwards. `bessemer run` calls this flow in its own process; a work pool's worker runs the deployment that
`prefect.yaml` declares.
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

from flows import artifacts, graph, records, workplace
from flows.graph import Graph
from flows.records import Outcome
from flows.run import Run


@flow(name="bessemer", flow_run_name=records.new_run_id, persist_result=False)
def chain(project: str = ".", stages: list[str] | None = None, worktree: bool = False) -> State[Any]:
    """Run every stage that is not up to date (or `stages` and what they need), then build, report and tell."""
    run_id = runtime.flow_run.name
    with workplace.place(Path(project), run_id, worktree=worktree) as place, Run(run_id, place) as run:
        plan = graph.select(graph.read(place), stages or [])
        if worktree:  # elsewhere `bessemer run` has asked
            workplace.check(place, [name for name in plan if plan[name].dirty])
        work_through(run, plan)
        records.write_flow(place, run_id, run.outcomes)
        report(run.quoted, return_state=True)  # where it breaks, its task says so; the models are made all the same
        artifacts.publish(place, plan, run.outcomes, run_id)
        run.watcher.finished(run_id, run.outcomes)
        return verdict(run.outcomes, plan)


@task(persist_result=False, cache_policy=NO_CACHE)
def stage(run: Run, name: str) -> State[Any]:
    """Do what DVC says of one stage, and say how it went."""
    reasons = graph.reasons(run.place, name)
    if not reasons:
        run.ended(name, Outcome("up to date"))
        return Completed(name="UpToDate", message="Nothing that it depends on has changed.")
    return run.do(name, reasons)


@task(name="build", task_run_name="build", persist_result=False, cache_policy=NO_CACHE)
def build(run: Run) -> State[Any]:
    """Make the Bento of what `package` left, or find that there is one: DVC may have restored it from its cache."""
    from serving.build import build as make
    from serving.errors import ServingError

    began = time.perf_counter()
    run.watcher.started("build", ("a packaged model",))
    try:
        built = make(run.place / "data" / "package", run.place)
    except ServingError as error:
        run.ended("build", Outcome("failed", time.perf_counter() - began, f"build: {error}"))
        return Failed(message=str(error))
    get_run_logger().info("%s lies in %s", built.tag, built.path)
    run.watcher.line("build", built.tag)
    run.ended("build", Outcome("ran" if built.made else "up to date", time.perf_counter() - began))
    return Completed(message=built.tag) if built.made else Completed(name="UpToDate", message=built.tag)


@task(name="report", task_run_name="report", persist_result=False, cache_policy=NO_CACHE)
def report(run: Run) -> None:
    """Write the page that tells of the run, however it ended."""
    from flows.report import write_report

    get_run_logger().info("The report is %s", write_report(run.place, run.id).resolve())


def work_through(run: Run, plan: Graph) -> None:
    """Start every stage once those it needs are done and a place is free, the one with the longest way ahead first."""
    logs = records.last_logs(run.place)
    ahead = graph.way_ahead(plan, lambda name: float(logs.get(name, {}).get("seconds", 1.0)))
    waiting, busy = sorted(plan, key=lambda name: -ahead[name]), 0
    futures: dict[str, PrefectFuture[Any]] = {}
    ended: SimpleQueue[str] = SimpleQueue()

    def start(name: str) -> None:
        named = stage.with_options(name=name, task_run_name=name)
        needs = [futures[need] for need in plan[name].needs]  # the arrows of the run's graph
        futures[name] = named.submit(run.quoted, name, return_state=False, wait_for=needs)
        futures[name].add_done_callback(lambda _: ended.put(name))

    while True:
        ready = [name for name in waiting if all(run.done(need) for need in plan[name].needs)]
        for name in ready[: run.places - busy]:
            start(name)
            waiting.remove(name)
            busy += 1
        if not busy:
            break
        name = ended.get()
        run.note_breakage(name, futures[name].state)
        busy -= 1
    if "package" in plan and run.done("package"):
        state = build(run.quoted, return_state=True, wait_for=[futures["package"]])
        run.note_breakage("build", state)


def verdict(outcomes: Mapping[str, Outcome], plan: Graph) -> State[Any]:
    """Return how the run as a whole ended: as well as its worst stage."""
    failed = [outcome.message for outcome in outcomes.values() if outcome.status == "failed"]
    if failed:
        return Failed(message="\n".join(failed))
    if any(name not in outcomes or not outcomes[name].done for name in plan):
        return Cancelled(
            message="The run was stopped before its end; the next one goes on from the last complete stage."
        )
    done = [outcomes[name].status for name in plan]
    return Completed(
        message=f"{len(done) - done.count('up to date')} stages ran, {done.count('up to date')} were up to date."
    )
