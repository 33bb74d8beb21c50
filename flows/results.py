"""What the run report reads: a run's stages as DVC, the records and the logs tell of them, and the files they left.

Everything is read once, when `Results` is made or a file is asked for; nothing is written. A figure measured in a run
is taken only from a log whose recipe is that of the results which lie in the project now: a newer or older run of other
settings says nothing about them.
"""

import csv
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flows import graph, records
from flows.graph import Graph, GraphError
from tasks.common.settings import SettingsError, read_params
from tasks.common.stage import record_path

DONE = ("ran", "restored", "up to date", "earlier")


@dataclass(frozen=True)
class Step:
    """One stage of the run: how it ended, the identity of what it left, and what was measured when that was made."""

    name: str
    needs: tuple[str, ...]
    status: str
    message: str = ""
    stale: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """How long its own work took when its results were made."""
        return _number(self.log.get("seconds"))

    def hash(self, part: str) -> str:
        """Return the start of its recipe or content hash, empty where it has no record."""
        return str(self.record.get(part, ""))[:12]


@dataclass(frozen=True)
class Results:
    """What one run of one project left."""

    project: Path
    id: str

    @cached_property
    def graph(self) -> Graph | GraphError:
        """DVC's graph, or why there is none."""
        try:
            return graph.read(self.project)
        except GraphError as error:
            return error

    @cached_property
    def logs(self) -> list[dict[str, Any]]:
        """Every stage's log of every run, oldest first, each with the run it belongs to."""
        return sorted(records.stage_logs(self.project), key=lambda log: str(log.get("started", "")))

    @cached_property
    def steps(self) -> dict[str, Step]:
        """All stages in DVC's order, then what the run did beside them (the Bento)."""
        flow = self.outcomes
        known: Graph = self.graph if isinstance(self.graph, dict) else {}
        affected = graph.affected(known)
        names = list(known) or list(dict.fromkeys(str(log["stage"]) for log in self.logs))
        steps = {name: self._step(name, known, name in affected) for name in names}
        for name in flow:
            if name not in steps:
                needs = ("package",) if name == "build" else ()
                steps[name] = Step(name, needs, str(flow[name].get("status")), str(flow[name].get("message", "")))
        return steps

    @cached_property
    def outcomes(self) -> dict[str, dict[str, Any]]:
        """How the run's stages ended, as the flow wrote it down; empty for stages run by hand."""
        flow = self.json(f"runs/{self.id}/flow.json")
        return dict(flow.get("stages", {})) if isinstance(flow, dict) else {}

    @cached_property
    def params(self) -> dict[str, Any]:
        """The contents of `params.yaml`; empty where it cannot be read."""
        try:
            return read_params(self.project / "params.yaml")
        except SettingsError:
            return {}

    @cached_property
    def sheet(self) -> dict[str, Any]:
        """The joined evaluation: `models` and `gates`; empty where no evaluation's results lie here."""
        return records.sheet(self.project) if self.left("compare") else {}

    def json(self, path: str) -> Any:
        """Return what a JSON file of the project holds, or None."""
        return records.read_json(self.project / path)

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return a stage's figures; empty where it has left none."""
        found = self.json(f"metrics/{stage}.json")
        return found if isinstance(found, dict) and self.left(stage) else {}

    def left(self, stage: str) -> bool:
        """Whether a stage's results lie here: git brings metrics of other runs, which say nothing of this one."""
        step = self.steps.get(stage)
        return step is None or bool(step.record)

    def settings(self, stage: str) -> dict[str, Any]:
        """Return the settings that a stage's results were made with, as its record has them."""
        step = self.steps.get(stage)
        found = step.record.get("settings") if step else None
        return found if isinstance(found, dict) else {}

    @property
    def algorithm(self) -> str:
        """How the policy was aligned, as people write it: PPO, DPO, RLOO or GRPO."""
        return str((self.settings("ppo").get("algorithm") or {}).get("name", "ppo")).upper()

    def history(self, stage: str) -> list[dict[str, float]]:
        """Return the rows of a stage's curves; empty where it has left none."""
        path = self.project / "data" / stage.replace("@", "/") / "history.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

    def own(self, log: dict[str, Any]) -> bool:
        """Whether a log belongs to this run; stages run by hand (`dvc repro`) each have a run of their own."""
        return log.get("run") == self.id or all(name.startswith("manual-") for name in (self.id, str(log.get("run"))))

    def _step(self, name: str, known: Graph, affected: bool) -> Step:
        record = records.read_json(self.project / record_path(*_split(name)))
        record = record if isinstance(record, dict) else {}
        same = [log for log in self.logs if log["stage"] == name and log.get("recipe") == record.get("recipe")]
        log = same[-1] if same and record else {}
        found = self.outcomes.get(name, {})
        status = str(found.get("status") or ("ran" if self.own(log) and log else "earlier" if record else "not run"))
        needs = known[name].needs if name in known else ()
        stale = ""
        if affected or status not in DONE:
            why = known[name].reasons if name in known else ()
            stale = why[0] if why else "a stage that it needs is out of date"
        return Step(name, needs, status, str(found.get("message", "")), stale if record else "", record, log)


def last_run(project: Path) -> str:
    """Return the newest run whose results are those that lie in the project; empty where there is none.

    A run in a worktree of its own, or one that came before a `dvc checkout`, left other results: its report is not
    to be written over with these.
    """
    logs: dict[str, list[dict[str, Any]]] = {}
    newest: dict[str, float] = {}
    for log in records.stage_logs(project):
        logs.setdefault(str(log["run"]), []).append(log)
    for path in project.glob("runs/*/*.json"):
        newest[path.parent.name] = max(newest.get(path.parent.name, 0.0), path.stat().st_mtime)
    for run in sorted(newest, key=lambda name: (newest[name], name), reverse=True):
        if all(agrees(project, log) for log in logs.get(run, ())):
            return run
    return ""


def agrees(project: Path, log: dict[str, Any]) -> bool:
    """Return whether a stage's log is of the recipe whose record lies in the project: another profile's is not."""
    record = records.read_json(project / record_path(*_split(str(log["stage"]))))
    return isinstance(record, dict) and record.get("recipe") == log.get("recipe")


def _split(name: str) -> tuple[str, str | None]:
    stage, _, key = name.partition("@")
    return stage, key or None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
