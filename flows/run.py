"""One run of the flow: where it works, what is under way, and what came of each stage."""

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
from tasks.common.settings import read_params


@dataclass
class Run:
    """One run: its folder, its running stages and what came of each. Leaving it by an exception ends the stages."""

    id: str
    place: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    watcher: Watcher = field(default_factory=WATCHER.get)

    def __post_init__(self) -> None:
        self.runner = Runner(self.place, self.id)
        self.places = int(read_params(self.place / "params.yaml")["placement"]["side_by_side"])

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

    def done(self, name: str) -> bool:
        """Whether a stage's results are there and up to date."""
        return name in self.outcomes and self.outcomes[name].done

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
            if str(artifacts.REFUSED.parent) in str(error):  # it says so only where it has just written the page
                artifacts.publish_validation(self.place / artifacts.REFUSED)
            return Failed(message=str(error))
        except StageStopped as error:
            self.ended(name, Outcome("stopped", time.perf_counter() - began, str(error)))
            return Cancelled(message=str(error))
        bar.complete()
        if name == "validate":
            artifacts.publish_validation(self.place / artifacts.VALIDATION)
        # The stage itself writes its log; where there is none, DVC has taken the results of such a run from its cache.
        ran = (self.place / "runs" / self.id / f"{name}.json").exists()
        self.ended(name, Outcome("ran" if ran else "restored", time.perf_counter() - began))
        return Completed(message=None) if ran else Completed(name="Restored", message="Taken from DVC's cache.")
