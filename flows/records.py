"""Results of earlier runs: logs in `runs/`, the stages' records in `data/`, the scorecard in `metrics/`.

Each stage writes its own files; this module only reads them. The exception is `runs/<run id>/flow.json`, the outcome of
a run as a whole, which is written here.
"""

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tasks.common.harness.records import write_json

SCORECARD_PATH = Path("metrics/evaluate.json")
SAMPLES_PATH = Path("data/compare/samples.html")
MEASURED_FIGURES = ("tokens_per_second", "seconds", "peak_memory_bytes")
Status = Literal["ran", "restored", "up to date", "failed", "stopped", "not run"]


@dataclass(frozen=True)
class Outcome:
    """How one stage of one run ended."""

    status: Status
    seconds: float = 0.0
    message: str = ""

    @property
    def done(self) -> bool:
        """Whether the stage's results exist and belong to its current inputs."""
        return self.status in ("ran", "restored", "up to date")


def new_run_id() -> str:
    """Return `run-<UTC time>-<4 hex digits>`, which sorts by time and is unique within a second."""
    return f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file, or None if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def last_logs(project: Path) -> dict[str, dict[str, Any]]:
    """Return each stage's log of its last execution (`runs/*/<stage>.json`)."""
    logs: dict[str, dict[str, Any]] = {}
    for log in stage_logs(project):
        known = logs.get(log["stage"])
        if known is None or log.get("started", "") > known.get("started", ""):
            logs[log["stage"]] = log
    return logs


def stage_logs(project: Path) -> Iterator[dict[str, Any]]:
    """Yield every stage log of every run, with the run's id."""
    for path in sorted(project.glob("runs/*/*.json")):
        log = read_json(path)
        if isinstance(log, dict) and "stage" in log and "seconds" in log:
            yield {**log, "run": path.parent.name}


def stage_record(project: Path, outs: Iterable[str]) -> dict[str, Any]:
    """Return the identity record among a stage's outputs; empty if it has none."""
    for out in outs:
        if Path(out).name == "record.json":
            record = read_json(project / out)
            return record if isinstance(record, dict) else {}
    return {}


def read_scorecard(project: Path) -> dict[str, Any]:
    """Return the scorecard: `models` in graph order and `gates`; both empty before the first evaluation."""
    found = read_json(project / SCORECARD_PATH)
    return found if isinstance(found, dict) else {"models": [], "gates": []}


def gate_words(gate: dict[str, Any]) -> str:
    """Return the figure that a gate checks, in words: `exact match heldout of pruned against tuned`."""
    words = f"{str(gate.get('metric')).replace('_', ' ')} of {gate.get('model')}"
    other = gate.get("against")
    return words if other is None else f"{words} {'relative to' if gate.get('relative') else 'against'} {other}"


def gate_limits(gate: dict[str, Any]) -> str:
    """Return a gate's bounds: `≥ 0.5`, `≤ 0.28`, or both."""
    return " and ".join(
        f"{sign} {gate[key]:g}" for key, sign in (("min", "≥"), ("max", "≤")) if gate.get(key) is not None
    )


def scorecard_rows(project: Path) -> list[dict[str, Any]]:
    """Return the scorecard's rows, each joined with the measurements of the run that made its model.

    `tokens_per_second` is the training speed or, for models of `quantize`, the decoding speed.
    """
    found = list(stage_logs(project))
    return [
        {**row, **_measurements(project, str(row.get("made_by", "")), found)}
        for row in read_scorecard(project)["models"]
    ]


def _measurements(project: Path, stage: str, logs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a stage's newest log with the recipe of its current results."""
    name, _, key = stage.partition("@")
    recipe = (read_json(project / "data" / name / key / "record.json") or {}).get("recipe")
    same = [log for log in logs if log["stage"] == stage and log.get("recipe") == recipe]
    log = max(same, key=lambda log: str(log.get("started", "")), default={})
    speed = log.get("tokens_per_second", log.get("int8_tokens_per_second"))
    return {**{name: log.get(name) for name in MEASURED_FIGURES}, "tokens_per_second": speed}


def write_flow(project: Path, run_id: str, outcomes: dict[str, Outcome]) -> Path:
    """Write the outcomes of a run's stages to `runs/<run id>/flow.json`."""
    path = project / "runs" / run_id / "flow.json"
    write_json(path, {"run": run_id, "stages": {name: asdict(outcome) for name, outcome in outcomes.items()}})
    return path
