"""The flow: one task run a DVC stage, in DVC's order, independent stages side by side.

DVC alone decides what is up to date; here each stage is started when those it needs are done, followed while it runs,
and told of afterwards. `bessemer run` calls this flow in its own process; a work pool's worker runs the deployment that
`prefect.yaml` declares.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed
from prefect.utilities.annotations import quote

from flows import artifacts, graph, records, workplace
from flows.graph import Graph
from flows.records import Outcome
from flows.runner import Runner, StageFailed, StageStopped
from flows.watch import WATCHER, Watcher
from tasks.common.settings import read_params


@flow(name="bessemer", flow_run_name=records.new_run_id, persist_result=False)
def chain(project: str = ".", stages: list[str] | None = None, worktree: bool = False) -> State[Any]:
    """Run every stage that is not up to date (or `stages` and what they need), then build, report and tell."""
    run_id = runtime.flow_run.name
    with workplace.place(Path(project), run_id, worktree=worktree) as place, Run(run_id, place) as run:
        plan = graph.select(graph.read(place), stages or [])
        futures = submit(run, plan)
        for name, future in futures.items():
            future.wait()
            run.note_breakage(name, future.state)
        records.write_flow(place, run_id, run.outcomes)
        report(run.quoted, return_state=True)  # where it breaks, its task says so; the models are made all the same
        artifacts.publish(place, plan, run.outcomes, run_id)
        run.watcher.finished(run_id, run.outcomes)
        return verdict(run.outcomes, plan)


@task(persist_result=False, cache_policy=NO_CACHE)
def stage(run: "Run", name: str, urgency: float) -> State[Any]:
    """Do what DVC says of one stage, and say how it went."""
    reasons = graph.reasons(run.place, name)
    if not reasons:
        run.ended(name, Outcome("up to date"))
        return Completed(name="UpToDate", message="Nothing that it depends on has changed.")
    with run.slots.take(urgency):
        return run.do(name, reasons)


@task(name="build", task_run_name="build", persist_result=False, cache_policy=NO_CACHE)
def build(run: "Run") -> State[Any]:
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
def report(run: "Run") -> None:
    """Write the page that tells of the run, however it ended."""
    from flows.report import write_report

    get_run_logger().info("The report is %s", write_report(run.place, run.id))


def submit(run: "Run", plan: Graph) -> dict[str, PrefectFuture[Any]]:
    """Submit all stages at once, each waiting for those it needs: the UI shows the whole graph from the start."""
    logs = records.last_logs(run.place)
    ahead = graph.way_ahead(plan, lambda name: float(logs.get(name, {}).get("seconds", 1.0)))
    futures: dict[str, PrefectFuture[Any]] = {}
    for name, planned in plan.items():
        named = stage.with_options(name=name, task_run_name=name)
        needs = [futures[need] for need in planned.needs]
        futures[name] = named.submit(run.quoted, name, ahead[name], return_state=False, wait_for=needs)
    if "package" in plan:
        futures["build"] = build.submit(run.quoted, return_state=False, wait_for=[futures["package"]])
    return futures


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


@dataclass
class Run:
    """One run: its folder, its running stages and what came of each. Leaving it by an exception ends the stages."""

    id: str
    place: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    watcher: Watcher = field(default_factory=WATCHER.get)

    def __post_init__(self) -> None:
        self.runner = Runner(self.place, self.id)
        self.slots = Slots(int(read_params(self.place / "params.yaml")["placement"]["side_by_side"]))

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.stop()

    @property
    def quoted(self) -> Any:
        """This run as a task's parameter, in which Prefect does not look for futures."""
        return quote(self)

    def ended(self, name: str, outcome: Outcome) -> None:
        """Keep and tell how a stage ended."""
        self.outcomes[name] = outcome
        self.watcher.ended(name, outcome)

    def note_breakage(self, name: str, state: State[Any]) -> None:
        """Keep a task that broke before it could say how its stage ended: a mistake of ours, not of the stage's."""
        if name not in self.outcomes and (state.is_failed() or state.is_crashed()):
            self.ended(name, Outcome("failed", message=f"{name}: {state.message}"))

    def do(self, name: str, reasons: tuple[str, ...]) -> State[Any]:
        """Run one stage and follow it."""
        log, bar, began = get_run_logger(), artifacts.ProgressArtifact(name), time.perf_counter()
        log.info("%s runs: %s", name, "; ".join(reasons))
        self.watcher.started(name, reasons)

        def line(text: str) -> None:
            log.info("%s", text)
            self.watcher.line(name, text)

        def progress(percent: float, text: str) -> None:
            bar.show(percent, text)
            self.watcher.progress(name, percent, text)

        try:
            self.runner.run(name, line, progress)
        except StageFailed as error:
            self.ended(name, Outcome("failed", time.perf_counter() - began, str(error)))
            return Failed(message=str(error))
        except StageStopped as error:
            self.ended(name, Outcome("stopped", time.perf_counter() - began, str(error)))
            return Cancelled(message=str(error))
        bar.complete()
        if name == "validate":
            artifacts.publish_validation(self.place)
        # The stage itself writes its log; where there is none, DVC has taken the results of such a run from its cache.
        ran = (self.place / "runs" / self.id / f"{name}.json").exists()
        self.ended(name, Outcome("ran" if ran else "restored", time.perf_counter() - began))
        return Completed(message=None) if ran else Completed(name="Restored", message="Taken from DVC's cache.")


class Slots:
    """Places for stages at work. Of those that wait, the one with the longest way still behind it goes first."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int]] = []
        self._number = count()

    @contextmanager
    def take(self, urgency: float) -> Iterator[None]:
        """Wait for a place and hold it."""
        with self._changed:
            entry = (-urgency, next(self._number))
            heappush(self._waiting, entry)
            self._changed.wait_for(lambda: self._free > 0 and self._waiting[0] == entry)
            heappop(self._waiting)
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
