"""Terminal output of `bessemer run`: the plan, the progress of each stage, and the results.

On a terminal the running stages have progress bars at the bottom. Elsewhere (a log file, CI) the output is plain lines,
with a stage's progress every PROGRESS_INTERVAL_S seconds.
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
from flows.records import SAMPLES_PATH, Outcome

PROGRESS_INTERVAL_S = 10.0
MARKS = {"ran": "✓", "restored": "✓", "up to date": "·", "failed": "✗", "stopped": "■", "not run": " "}
SCORECARD_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # column: heading and format
    "model": ("model", str),
    "parameters": ("para-\nmeters", lambda value: f"{value / 1e6:.2f} M"),
    "bytes": ("size", lambda value: f"{value / 1e6:.1f} MB"),
    "exact_match_seen": ("seen\n%", lambda value: f"{100 * value:.1f}"),
    "exact_match_heldout": ("held\nout %", lambda value: f"{100 * value:.1f}"),
    "accuracy": ("acc.\n%", lambda value: f"{100 * value:.1f}"),
    "masked_names": ("names\n%", lambda value: f"{100 * value:.1f}"),
    "perplexity": ("perpl.", lambda value: f"{value:.2f}"),
    "bits_per_byte": ("bits/\nbyte", lambda value: f"{value:.2f}"),
    "answer_loss": ("answer\nloss", lambda value: f"{value:.2f}"),
    "chrf": ("chrF\n%", lambda value: f"{100 * value:.0f}"),
    "preference_accuracy": ("pref.\n%", lambda value: f"{100 * value:.0f}"),
    "implicit_reward_accuracy": ("pref.\ngain %", lambda value: f"{100 * value:.0f}"),
    "abstained_out_of_scope": ("decl.\nout %", lambda value: f"{100 * value:.0f}"),
    "reward_mean": ("reward", lambda value: f"{value:.2f}"),
    "win_rate": ("wins\n%", lambda value: f"{100 * value:.0f}"),
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
    """Return a console on standard output, as wide as the terminal and at least 100 columns in a log."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, 100), soft_wrap=True)


class Terminal:
    """The watcher that shows a run in the terminal. Use as a context manager."""

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
        self._last_printed: dict[str, float] = {}
        self._lock = threading.Lock()
        self.run_id = ""
        self.outcomes: Mapping[str, Outcome] = {}

    def __enter__(self) -> "Terminal":
        if self.out.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def on_stage_start(self, name: str, reasons: Sequence[str]) -> None:
        """Print that a stage starts, and add its progress bar."""
        with self._lock:
            self.out.print(f"[bold]▸ {escape(name)}[/]  [dim]{escape(reasons[0])}[/]")
            self._last_printed[name] = time.monotonic()
            self._tasks[name] = self._bars.add_task(escape(name), total=100, text="")

    def on_line(self, name: str, text: str) -> None:
        """Print a line of a stage's output, prefixed with the stage's name."""
        self.out.print(f"[dim]  {escape(name)} │[/] {escape(text)}")

    def on_progress(self, name: str, percent: float, text: str) -> None:
        """Update a stage's progress bar, or print its progress at intervals."""
        with self._lock:
            if self.out.is_terminal:
                self._bars.update(self._tasks[name], completed=percent, text=escape(text[:60]))
            elif time.monotonic() - self._last_printed[name] >= PROGRESS_INTERVAL_S:
                self._last_printed[name] = time.monotonic()
                self.out.print(f"  {escape(name)} │ {percent:.0f}% {escape(text)}")

    def on_stage_end(self, name: str, outcome: Outcome) -> None:
        """Print how a stage ended, unless it was up to date."""
        with self._lock:
            if name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            if outcome.status != "up to date":
                mark = f"[{STYLES[outcome.status]}]{MARKS[outcome.status]} {escape(name)}[/]"
                words = {"ran": "", "restored": "  from DVC's cache"}.get(outcome.status, f"  {outcome.status}")
                self.out.print(f"{mark}  {outcome.seconds:.1f} s{words}")

    def on_run_end(self, run_id: str, outcomes: Mapping[str, Outcome]) -> None:
        """Store the outcomes for the command's summary."""
        self.run_id, self.outcomes = run_id, outcomes


def show_plan(out: Console, project: Path, stages: Graph) -> None:
    """Print which stages will or may run, why, and how long the last run of each took."""
    logs = records.last_logs(project)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("stage")
    table.add_column("last took", justify="right")
    table.add_column("why", overflow="fold")
    affected = graph.affected(stages)
    due = [name for name in stages if name in affected]
    for name in due:
        seconds = f"{logs[name]['seconds']:.0f} s" if name in logs else ""
        why = (
            "\n".join(map(escape, stages[name].reasons))
            or f"[dim]after {escape(graph.first_due_need(stages, name, due))}[/]"
        )
        table.add_row(escape(name), seconds, why)
    out.print(f"{len(due)} of {len(stages)} stages to run; {len(stages) - len(due)} up to date.")
    out.print(table)
    known = [float(logs[name]["seconds"]) for name in due if name in logs]
    if known:
        missing = f", not counting {len(due) - len(known)} that have not run here yet" if len(known) < len(due) else ""
        out.print(f"Run one after another, these took {duration(sum(known))} when they last ran{missing}.")


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


def show_scorecard(out: Console, project: Path) -> None:
    """Print the scorecard of all models and the gates, if there is one."""
    scorecard, rows = records.read_scorecard(project), records.scorecard_rows(project)
    if not rows:
        out.print("No model has been evaluated yet: run `bessemer run`.")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    columns = {
        name: column for name, column in SCORECARD_COLUMNS.items() if any(row.get(name) is not None for row in rows)
    }
    for heading, _ in columns.values():
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(form(row[name]) if row.get(name) is not None else "" for name, (_, form) in columns.items()))
    out.print(table)
    failed = [gate for gate in scorecard["gates"] if not gate["passed"]]
    gates = len(scorecard["gates"])
    out.print(f"{gates - len(failed)} of {gates} gates passed." if gates else "No gates are set (compare.gates).")
    for gate in failed:
        value = "no value" if gate["value"] is None else f"{gate['value']:.4g}"
        out.print(f"[red]✗[/] {escape(records.gate_words(gate))}: {value}, limit {escape(records.gate_limits(gate))}")


def show_pages(out: Console, project: Path, report: Path, *, compared: bool = True) -> None:
    """Print the paths of the run report and, if this run made it, of the samples page."""
    for name, path in (("Report", report), ("Samples", project / SAMPLES_PATH)):
        if path.is_file() and (path == report or compared):
            out.print(f"{name}: {path}")


def show_commands(out: Console, lines: Iterable[tuple[str, str]]) -> None:
    """Print commands with their descriptions."""
    rows = list(lines)
    width = max(len(command) for command, _ in rows)
    for command, does in rows:
        out.print(f"  [bold]{escape(command):{width}}[/]  {escape(does)}")


def duration(seconds: float) -> str:
    """Format a duration in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
