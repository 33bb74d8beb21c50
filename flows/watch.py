"""Callbacks of a run: the terminal of `bessemer run`, or none (a worker's run is shown in Prefect's UI)."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol

from flows.records import Outcome


class Watcher(Protocol):
    """Callbacks that a run calls from several threads."""

    def on_stage_start(self, name: str, reasons: Sequence[str]) -> None:
        """A stage starts, for these reasons."""

    def on_line(self, name: str, text: str) -> None:
        """A stage printed a line."""

    def on_progress(self, name: str, percent: float, text: str) -> None:
        """A stage reported its progress."""

    def on_stage_end(self, name: str, outcome: Outcome) -> None:
        """A stage ended."""

    def on_run_end(self, run_id: str, outcomes: Mapping[str, Outcome]) -> None:
        """The run ended."""


class NullWatcher:
    """A watcher that does nothing."""

    def on_stage_start(self, name: str, reasons: Sequence[str]) -> None:
        """Do nothing."""

    def on_line(self, name: str, text: str) -> None:
        """Do nothing."""

    def on_progress(self, name: str, percent: float, text: str) -> None:
        """Do nothing."""

    def on_stage_end(self, name: str, outcome: Outcome) -> None:
        """Do nothing."""

    def on_run_end(self, run_id: str, outcomes: Mapping[str, Outcome]) -> None:
        """Do nothing."""


WATCHER: ContextVar[Watcher] = ContextVar("WATCHER", default=NullWatcher())  # noqa: B039 - the default has no state
