"""One run of the flow: its working directory, its running stages, and their outcomes."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed
from prefect.utilities.annotations import quote

from flows import artifacts
from flows.records import Outcome
from flows.runner import Runner, StageFailed, StageStopped
from flows.watch import WATCHER, Watcher
from tasks.common.raw_params import read_params
from tasks.common.settings import Placement


@dataclass
class Run:
    """One run. As a context manager it stops the running stages on exit, also after an exception."""

    id: str
    workdir: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    watcher: Watcher = field(default_factory=WATCHER.get)

    def __post_init__(self) -> None:
        self.runner = Runner(self.workdir, self.id)
        self.max_parallel_stages = Placement.model_validate(
            read_params(self.workdir / "params.yaml")["placement"]
        ).max_parallel_stages

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.stop()

    @property
    def quoted(self) -> Any:
        """This run as a task parameter that Prefect does not search for futures."""
        return quote(self)

    def record_outcome(self, name: str, outcome: Outcome) -> None:
        """Store how a stage ended and notify the watcher."""
        self.outcomes[name] = outcome
        self.watcher.on_stage_end(name, outcome)

    def done(self, name: str) -> bool:
        """Whether a stage's results exist and are up to date."""
        return name in self.outcomes and self.outcomes[name].done

    def record_crash(self, name: str, state: State[Any]) -> None:
        """Record the failure of a task that ended without an outcome: an error of the flow, not of the stage."""
        if name not in self.outcomes and (state.is_failed() or state.is_crashed()):
            self.record_outcome(name, Outcome("failed", message=f"{name}: {state.message}"))

    def run_stage(self, name: str, reasons: tuple[str, ...]) -> State[Any]:
        """Run one stage, report its progress and record its outcome."""
        log, bar, started = get_run_logger(), artifacts.ProgressArtifact(name), time.perf_counter()
        log.info("%s runs: %s", name, "; ".join(reasons))
        self.watcher.on_stage_start(name, reasons)

        def line(text: str) -> None:
            log.info("%s", text)
            self.watcher.on_line(name, text)

        def progress(percent: float, text: str) -> None:
            bar.show(percent, text)
            self.watcher.on_progress(name, percent, text)

        try:
            self.runner.run(name, line, progress)
        except StageFailed as error:
            self.record_outcome(name, Outcome("failed", time.perf_counter() - started, str(error)))
            if str(artifacts.REJECTED_REPORT.parent) in str(
                error
            ):  # it names the report only if it has just written it
                artifacts.publish_validation(self.workdir / artifacts.REJECTED_REPORT)
            return Failed(message=str(error))
        except StageStopped as error:
            self.record_outcome(name, Outcome("stopped", time.perf_counter() - started, str(error)))
            return Cancelled(message=str(error))
        bar.complete()
        if name == "validate":
            artifacts.publish_validation(self.workdir / artifacts.VALIDATION_REPORT)
        # A stage that runs writes its log. Without a log, DVC has restored the results from its cache.
        ran = (self.workdir / "runs" / self.id / f"{name}.json").exists()
        self.record_outcome(name, Outcome("ran" if ran else "restored", time.perf_counter() - started))
        return Completed(message=None) if ran else Completed(name="Restored", message="Restored from DVC's cache.")
