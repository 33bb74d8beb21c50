"""What earlier runs left: their figures in `runs/`, the stages' records in `data/`, the joined sheet in `metrics/`.

Only read here (each stage writes its own), apart from `runs/<run id>/flow.json`, which tells how a run as a whole went.
"""

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tasks.common.stage import write_json

SHEET = Path("metrics/evaluate.json")
SAMPLES = Path("data/compare/samples.html")
MEASURED = ("tokens_per_second", "seconds", "peak_memory_bytes")
Status = Literal["ran", "restored", "up to date", "failed", "stopped", "not run"]


@dataclass(frozen=True)
class Outcome:
    """How one stage of one run ended."""

    status: Status
    seconds: float = 0.0
    message: str = ""

    @property
    def done(self) -> bool:
        """Whether the stage's results are there and belong to its inputs."""
        return self.status in ("ran", "restored", "up to date")


def new_run_id() -> str:
    """Return `run-<UTC time>-<4 hex digits>`: it sorts by time and two runs of one second differ."""
    return f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None where it is missing or was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def last_logs(project: Path) -> dict[str, dict[str, Any]]:
    """Return for each stage what was measured when it last really ran (`runs/*/<stage>.json`)."""
    logs: dict[str, dict[str, Any]] = {}
    for log in stage_logs(project):
        known = logs.get(log["stage"])
        if known is None or log.get("started", "") > known.get("started", ""):
            logs[log["stage"]] = log
    return logs


def stage_logs(project: Path) -> Iterator[dict[str, Any]]:
    """Yield what was measured of every stage in every run, with the run's id."""
    for path in sorted(project.glob("runs/*/*.json")):
        log = read_json(path)
        if isinstance(log, dict) and "stage" in log and "seconds" in log:
            yield {**log, "run": path.parent.name}


def stage_record(project: Path, outs: Iterable[str]) -> dict[str, Any]:
    """Return the identity record among a stage's outputs; empty where it has none."""
    for out in outs:
        if Path(out).name == "record.json":
            record = read_json(project / out)
            return record if isinstance(record, dict) else {}
    return {}


def sheet(project: Path) -> dict[str, Any]:
    """Return the joined evaluation: `models` in chain order and `gates`; both empty before the first evaluation."""
    found = read_json(project / SHEET)
    return found if isinstance(found, dict) else {"models": [], "gates": []}


def rows(project: Path) -> list[dict[str, Any]]:
    """Return the sheet's rows, each joined with what was measured when its model was made.

    Tokens a second are those of training or, for what `quantize` made, those of decoding.
    """
    found = list(stage_logs(project))
    return [{**row, **_measured(project, _maker(project, row["model"]), found)} for row in sheet(project)["models"]]


def _measured(project: Path, stage: str, logs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a stage's newest run, of those that made what lies there now: runs of one recipe."""
    name, _, key = stage.partition("@")
    recipe = (read_json(project / "data" / name / key / "record.json") or {}).get("recipe")
    same = [log for log in logs if log["stage"] == stage and log.get("recipe") == recipe]
    log = max(same, key=lambda log: str(log.get("started", "")), default={})
    speed = log.get("tokens_per_second", log.get("int8_tokens_per_second"))
    return {**{name: log.get(name) for name in MEASURED}, "tokens_per_second": speed}


def _maker(project: Path, model: str) -> str:
    """Return the stage that made a model: the record of its evaluation says which folder was read."""
    record = read_json(project / "data" / "evaluate" / model / "record.json") or {"inputs": {}}
    folders = [Path(path) for path in record["inputs"] if Path(path).name == "model"]
    return next(("@".join(folder.parts[1:-1]) for folder in folders if folder.parts[1] != "reward"), "")


def write_flow(project: Path, run_id: str, outcomes: dict[str, Outcome]) -> Path:
    """Keep how a run went: its stages' outcomes and seconds."""
    path = project / "runs" / run_id / "flow.json"
    write_json(path, {"run": run_id, "stages": {name: asdict(outcome) for name, outcome in outcomes.items()}})
    return path
