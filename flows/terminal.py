"""What `bessemer run` shows: the plan first, then each stage as it goes, then what came of it.

On a terminal the stages under way have a progress bar at the bottom; elsewhere (a log file, CI) everything is plain
lines, and a stage's progress is told every few seconds.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from flows import graph, records
from flows.graph import Graph
from flows.records import SAMPLES, Outcome

TELL_S = 10.0
MARKS = {"ran": "✓", "restored": "✓", "up to date": "·", "failed": "✗", "stopped": "■", "not run": " "}
SHEET: dict[str, tuple[str, Callable[[Any], str]]] = {  # column: its heading, in two lines so that all fit, and form
    "model": ("model", str),
    "parameters": ("para-\nmeters", lambda value: f"{value / 1e6:.2f} M"),
    "bytes": ("size", lambda value: f"{value / 1e6:.1f} MB"),
    "exact_match_tuned": ("tuned\n%", lambda value: f"{100 * value:.1f}"),
    "exact_match_heldout": ("held\nout %", lambda value: f"{100 * value:.1f}"),
    "masked_names": ("names\n%", lambda value: f"{100 * value:.1f}"),
    "perplexity": ("perpl.", lambda value: f"{value:.2f}"),
    "bits_per_byte": ("bits/\nbyte", lambda value: f"{value:.2f}"),
    "reward_mean": ("reward", lambda value: f"{value:.2f}"),
    "win_rate_over_tuned": ("wins\n%", lambda value: f"{100 * value:.0f}"),
    "toxic_share": ("toxic\n%", lambda value: f"{100 * value:.1f}"),
    "distinct_2": ("dist.\n2", lambda value: f"{value:.2f}"),
    "tokens_per_second": ("tok/s", lambda value: f"{value:.0f}"),
    "seconds": ("s", lambda value: f"{value:.0f}"),
    "peak_memory_bytes": ("GB", lambda value: f"{value / 1e9:.1f}"),
}
STYLES = {
    "ran": "green",
    "restored": "cyan",
    "up to date": "dim",
    "failed": "red",
    "stopped": "yellow",
    "not run": "dim",
}


def console() -> Console:
    """Return the console for results: standard output, as wide as the terminal or 100 columns."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, 100), soft_wrap=True)


class Terminal:
    """The watcher of a run from the command line. Use as a context manager."""

    def __init__(self, out: Console) -> None:
        self.out = out
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f}%"))
        self._bars = Progress(
            *columns,
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[text]}"),
            console=out,
            transient=True,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()
        self.run_id = ""
        self.outcomes: Mapping[str, Outcome] = {}

    def __enter__(self) -> "Terminal":
        if self.out.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def started(self, name: str, reasons: Sequence[str]) -> None:
        """Show that a stage begins."""
        with self._lock:
            self.out.print(f"[bold]▸ {escape(name)}[/]  [dim]{escape(reasons[0])}[/]")
            self._told[name] = time.monotonic()
            self._tasks[name] = self._bars.add_task(escape(name), total=100, text="")

    def line(self, name: str, text: str) -> None:
        """Show a line that a stage printed, with the stage's name before it."""
        self.out.print(f"[dim]  {escape(name)} │[/] {escape(text)}")

    def progress(self, name: str, percent: float, text: str) -> None:
        """Move a stage's bar, or tell now and then how far it is."""
        with self._lock:
            if self.out.is_terminal:
                self._bars.update(self._tasks[name], completed=percent, text=escape(text[:60]))
            elif time.monotonic() - self._told[name] >= TELL_S:
                self._told[name] = time.monotonic()
                self.out.print(f"  {escape(name)} │ {percent:.0f}% {escape(text)}")

    def ended(self, name: str, outcome: Outcome) -> None:
        """Show how a stage ended; one that was up to date is not worth a line."""
        with self._lock:
            if name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            if outcome.status != "up to date":
                mark = f"[{STYLES[outcome.status]}]{MARKS[outcome.status]} {escape(name)}[/]"
                words = {"ran": "", "restored": "  from DVC's cache"}.get(outcome.status, f"  {outcome.status}")
                self.out.print(f"{mark}  {outcome.seconds:.1f} s{words}")

    def finished(self, run_id: str, outcomes: Mapping[str, Outcome]) -> None:
        """Keep the outcomes for the summary, to which the command has more to add."""
        self.run_id, self.outcomes = run_id, outcomes


def show_plan(out: Console, project: Path, stages: Graph) -> None:
    """Print which stages will run and why, which may follow, and about how long the last run of each took."""
    logs = records.last_logs(project)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("stage")
    table.add_column("last took", justify="right")
    table.add_column("why", overflow="fold")
    affected = graph.affected(stages)
    due = [name for name in stages if name in affected]
    for name in due:
        seconds = f"{logs[name]['seconds']:.0f} s" if name in logs else ""
        why = "\n".join(map(escape, stages[name].reasons)) or f"[dim]after {escape(_first(stages, name, due))}[/]"
        table.add_row(escape(name), seconds, why)
    out.print(f"{len(due)} of {len(stages)} stages to run; {len(stages) - len(due)} up to date.")
    out.print(table)
    known = [float(logs[name]["seconds"]) for name in due if name in logs]
    if known:
        missing = f", without {len(due) - len(known)} that have not run here yet" if len(known) < len(due) else ""
        out.print(f"One after another these took {duration(sum(known))} when they last ran{missing}.")


def show_status(out: Console, project: Path, stages: Graph) -> None:
    """Print each stage's state and its last run."""
    logs = records.last_logs(project)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("stage", "state", "last run", "took", "recipe"):
        table.add_column(heading)
    for name, stage in stages.items():
        log = logs.get(name, {})
        state = f"[yellow]{escape(stage.reasons[0])}[/]" if stage.dirty else "[green]up to date[/]"
        took = f"{log['seconds']:.0f} s" if log else ""
        recipe = str(records.stage_record(project, stage.outs).get("recipe", ""))[:12]
        table.add_row(escape(name), state, str(log.get("started", ""))[:16].replace("T", " "), took, recipe)
    out.print(table)


def show_seconds(out: Console, outcomes: Mapping[str, Outcome]) -> None:
    """Print how long each stage took."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading, justify in (("stage", "left"), ("seconds", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, outcome in outcomes.items():
        seconds = f"{outcome.seconds:.1f}" if outcome.seconds else ""
        table.add_row(escape(name), seconds, f"[{STYLES[outcome.status]}]{outcome.status}[/]")
    out.print(table)


def show_sheet(out: Console, project: Path) -> None:
    """Print the joined sheet of all models and the gates, where there is one."""
    sheet, rows = records.sheet(project), records.rows(project)
    if not rows:
        out.print("No model has been evaluated yet: `bessemer run` does.")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    shown = {name: column for name, column in SHEET.items() if any(row.get(name) is not None for row in rows)}
    for heading, _ in shown.values():
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(form(row[name]) if row.get(name) is not None else "" for name, (_, form) in shown.items()))
    out.print(table)
    failed = [gate for gate in sheet["gates"] if not gate["passed"]]
    out.print(f"{len(sheet['gates']) - len(failed)} of {len(sheet['gates'])} gates passed.")
    for gate in failed:
        value = "no value" if gate["value"] is None else f"{gate['value']:.4g}"
        out.print(f"[red]✗[/] {escape(gate['name'])}: {value} against a limit of {gate['limit']:.4g}")


def show_pages(out: Console, project: Path, report: Path, *, compared: bool = True) -> None:
    """Print where the pages for people lie: the run's report, and the models' replies side by side if they are its."""
    for name, path in (("Report", report), ("Samples", project / SAMPLES)):
        if path.is_file() and (path == report or compared):
            out.print(f"{name}: {path}")


def show_commands(out: Console, lines: Iterable[tuple[str, str]]) -> None:
    """Print commands, each with what it does."""
    rows = list(lines)
    width = max(len(command) for command, _ in rows)
    for command, does in rows:
        out.print(f"  [bold]{escape(command):{width}}[/]  {escape(does)}")


def duration(seconds: float) -> str:
    """Return a span of time as people say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _first(stages: Graph, name: str, due: Sequence[str]) -> str:
    return next(need for need in stages[name].needs if need in due)
