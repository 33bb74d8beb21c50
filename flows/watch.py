"""Who looks on while a run goes: the terminal of `bessemer run`, or nobody (a worker's run shows in Prefect's UI)."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol

from flows.records import Outcome


class Watcher(Protocol):
    """What a run tells as it goes; called from several threads."""

    def started(self, name: str, reasons: Sequence[str]) -> None:
        """Tell that a stage begins, and why."""

    def line(self, name: str, text: str) -> None:
        """Pass on a line that a stage printed."""

    def progress(self, name: str, percent: float, text: str) -> None:
        """Tell how far a stage is."""

    def ended(self, name: str, outcome: Outcome) -> None:
        """Tell how a stage ended."""

    def finished(self, run_id: str, outcomes: Mapping[str, Outcome]) -> None:
        """Tell that all is over."""


class Nobody:
    """A watcher that looks away."""

    def started(self, name: str, reasons: Sequence[str]) -> None:
        """Look away."""

    def line(self, name: str, text: str) -> None:
        """Look away."""

    def progress(self, name: str, percent: float, text: str) -> None:
        """Look away."""

    def ended(self, name: str, outcome: Outcome) -> None:
        """Look away."""

    def finished(self, run_id: str, outcomes: Mapping[str, Outcome]) -> None:
        """Look away."""


WATCHER: ContextVar[Watcher] = ContextVar("WATCHER", default=Nobody())  # noqa: B039 - it holds nothing that could change
