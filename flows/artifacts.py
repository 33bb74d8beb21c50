"""Artifacts of a run in Prefect's UI: lineage (diagram and table), the scorecard, the validation report.

Plain functions make the texts; only `publish`, `publish_validation` and `ProgressArtifact` call Prefect. An artifact
belongs to the task or flow run in whose context it is created.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from flows import records
from flows.graph import Graph
from flows.records import Outcome
from flows.report.lineage import direct_needs

VALIDATION_REPORT = Path("data/validate/report/validation.md")
REJECTED_REPORT = Path("data/.failed/validate/validation.md")  # written when `validate` rejects the data
UPDATE_INTERVAL_S = 2.0
COLOURS = {
    "ran": "#d7f5dd",
    "restored": "#dcebfb",
    "up to date": "#eeeeee",
    "failed": "#fbd9d9",
    "stopped": "#fdecc8",
    "not run": "#ffffff",
}


def lineage(project: Path, graph: Graph, outcomes: Mapping[str, Outcome], run_id: str) -> str:
    """Return the lineage as markdown: a mermaid diagram of the stages and a table of their identities."""
    return f"# {run_id}\n\n```mermaid\n{diagram(graph, outcomes)}\n```\n\n{table(project, graph, outcomes)}\n"


def diagram(graph: Graph, outcomes: Mapping[str, Outcome]) -> str:
    """Return the stages as a mermaid flowchart, coloured by how each one ended."""
    edges = direct_needs({name: stage.needs for name, stage in graph.items()})
    number = {name: f"s{index}" for index, name in enumerate(graph)}
    status = {name: outcomes.get(name, Outcome("not run")).status for name in graph}
    lines = ["flowchart LR"]
    lines += [f'  {number[name]}["{name}"]:::{_css(status[name])}' for name in graph]
    lines += [f"  {number[need]} --> {number[name]}" for name, needs in edges.items() for need in needs]
    lines += [f"  classDef {_css(word)} fill:{colour},stroke:#888,color:#222" for word, colour in COLOURS.items()]
    return "\n".join(lines)


def table(project: Path, graph: Graph, outcomes: Mapping[str, Outcome]) -> str:
    """Return a markdown table with each stage's recipe, content hash, status and seconds."""
    lines = ["| stage | recipe | content | status | seconds |", "| --- | --- | --- | --- | ---: |"]
    for name, stage in graph.items():
        record = records.stage_record(project, stage.outs)
        outcome = outcomes.get(name, Outcome("not run"))
        hashes = [f"`{record[part][:12]}`" if part in record else "" for part in ("recipe", "content")]
        seconds = f"{outcome.seconds:.1f}" if outcome.seconds else ""
        lines.append(f"| {name} | {hashes[0]} | {hashes[1]} | {outcome.status} | {seconds} |")
    return "\n".join(lines)


def publish(project: Path, graph: Graph, outcomes: Mapping[str, Outcome], run_id: str) -> None:
    """Publish lineage and scorecard as artifacts of the flow run."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    text = lineage(project, graph, outcomes, run_id)
    create_markdown_artifact(text, key="lineage", description=f"What {run_id} was made from")
    models = records.read_scorecard(project)["models"]
    if models:
        rows = [{key: _cell(value) for key, value in model.items()} for model in models]
        create_table_artifact(rows, key="evaluation", description="The scorecard: every model on held-out data")


def publish_validation(path: Path) -> None:
    """Publish the validation report as an artifact of the task run, if there is one."""
    from prefect.artifacts import create_markdown_artifact

    if path.exists():
        text = path.read_text(encoding="utf-8")
        create_markdown_artifact(text, key="validation", description="Checks, kept rows and rejected rows")


class ProgressArtifact:
    """A stage's progress bar in the UI, updated at most every UPDATE_INTERVAL_S seconds."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self._clock = name, clock
        self._id: UUID | None = None
        self._next = 0.0

    def show(self, percent: float, text: str) -> None:
        """Update the bar, unless it was just updated."""
        import httpx
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        now = self._clock()
        if now < self._next:
            return
        self._next = now + UPDATE_INTERVAL_S
        description = f"{self.name}: {text}" if text else self.name
        try:
            if self._id is None:
                self._id = cast("UUID", create_progress_artifact(percent, description=description))
            else:
                update_progress_artifact(self._id, percent, description=description)
        except httpx.HTTPError:
            self._next = math.inf  # an unreachable server must not end a training run

    def complete(self) -> None:
        """Set the bar, if there is one, to 100 %."""
        if self._id is not None and self._next < math.inf:
            self._next = 0.0
            self.show(100.0, "done")


def _css(status: str) -> str:
    return status.replace(" ", "")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (dict, list)):
        return ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in _values(value))
    return "" if value is None else str(value)


def _values(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
