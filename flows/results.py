"""Input of the run report: the stages of a run from DVC's graph, the records and the logs, and their output files.

Nothing is written, and everything is read at most once. Measurements are taken only from a log whose recipe is that of
the current results in the project: logs of other settings do not apply to them.
"""

import csv
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flows import graph, records
from flows.code_changes import is_digest_file
from flows.graph import Graph, GraphError
from tasks.common.defaults import read_settings
from tasks.common.harness.job import record_path
from tasks.common.settings import PACKAGE_PARTS, SettingsError

DONE_STATUSES = ("ran", "restored", "up to date", "earlier")


@dataclass(frozen=True)
class Step:
    """One stage of the run: how it ended, the record of its results, and the log of the execution that made them."""

    name: str
    needs: tuple[str, ...]
    status: str
    message: str = ""
    stale: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Seconds of the stage's own work when its results were made."""
        return _as_float(self.log.get("seconds"))

    def hash(self, part: str) -> str:
        """Return the first 12 digits of its `recipe` or `content` hash; empty without a record."""
        return str(self.record.get(part, ""))[:12]


@dataclass(frozen=True)
class Results:
    """The results of one run of a project."""

    project: Path
    id: str

    @cached_property
    def graph(self) -> Graph | GraphError:
        """DVC's graph, or the error why it cannot be read."""
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
        """All stages in DVC's order, then the run's other tasks (the build of the Bento)."""
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
        """The outcomes of the run's stages from `flow.json`; empty for stages run by hand."""
        flow = self.json(f"runs/{self.id}/flow.json")
        return dict(flow.get("stages", {})) if isinstance(flow, dict) else {}

    @cached_property
    def params(self) -> dict[str, Any]:
        """The settings of `params.yaml` with their defaults; empty if it cannot be read."""
        try:
            return read_settings(self.project / "params.yaml")
        except SettingsError:
            return {}

    @cached_property
    def scorecard(self) -> dict[str, Any]:
        """The scorecard: `models` and `gates`; empty if `compare` has no results here."""
        return records.read_scorecard(self.project) if self.has_results("compare") else {}

    def json(self, path: str) -> Any:
        """Return the contents of a JSON file of the project, or None."""
        return records.read_json(self.project / path)

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return a stage's metrics; empty if it has no results here."""
        found = self.json(f"metrics/{stage}.json")
        return found if isinstance(found, dict) and self.has_results(stage) else {}

    def has_results(self, stage: str) -> bool:
        """Whether a stage's results exist here; its metrics may be in git without them, from another run."""
        step = self.steps.get(stage)
        return step is None or bool(step.record)

    def settings(self, stage: str) -> dict[str, Any]:
        """Return the settings in a stage's record."""
        step = self.steps.get(stage)
        found = step.record.get("settings") if step else None
        return found if isinstance(found, dict) else {}

    def entries(self, stage: str) -> list[str]:
        """Return the names of a stage's entries in graph order: `finetune@chat`, ..."""
        return [name for name in self.steps if name.partition("@")[0] == stage and "@" in name]

    def algorithm(self, stage: str) -> str:
        """Return the algorithm of an alignment: PPO, DPO, RLOO or GRPO."""
        return str((self.settings(stage).get("algorithm") or {}).get("name", "")).upper()

    @property
    def packaged(self) -> dict[str, str]:
        """The stages of the packaged models: `{"chat": "quantize@chat"}`."""
        package = self.params.get("package")
        paths = {part: str(package.get(part) or "") for part in PACKAGE_PARTS} if isinstance(package, dict) else {}
        return {part: "@".join(Path(path).parts[1:-1]) for part, path in paths.items() if path}

    def history(self, stage: str) -> list[dict[str, float]]:
        """Return the rows of a stage's `history.csv`; empty if there is none."""
        path = self.project / "data" / stage.replace("@", "/") / "history.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

    def belongs_to_run(self, log: dict[str, Any]) -> bool:
        """Whether a log belongs to this run; stages run by hand (`dvc repro`) count as one run."""
        return log.get("run") == self.id or all(name.startswith("manual-") for name in (self.id, str(log.get("run"))))

    def _step(self, name: str, known: Graph, affected: bool) -> Step:
        record = records.read_json(self.project / record_path(*_stage_and_key(name)))
        record = record if isinstance(record, dict) else {}
        matching_logs = [log for log in self.logs if log["stage"] == name and log.get("recipe") == record.get("recipe")]
        digests = (
            [out for out in known[name].outs if is_digest_file(out)] if name in known else []
        )  # `code` has digest files and no record
        has_results = bool(record) or (bool(digests) and all((self.project / out).exists() for out in digests))
        log = matching_logs[-1] if matching_logs and has_results else {}
        found = self.outcomes.get(name, {})
        status = str(
            found.get("status")
            or ("ran" if self.belongs_to_run(log) and log else "earlier" if has_results else "not run")
        )
        needs = known[name].needs if name in known else ()
        stale = ""
        if affected or status not in DONE_STATUSES:
            why = known[name].reasons if name in known else ()
            stale = why[0] if why else "a stage that it needs is out of date"
        return Step(name, needs, status, str(found.get("message", "")), stale if record else "", record, log)


def last_run(project: Path) -> str:
    """Return the newest run whose results are the current ones in the project; empty if there is none.

    A run in a worktree, or one before a `dvc checkout`, has other results; its report must not be overwritten with the
    current ones.
    """
    logs: dict[str, list[dict[str, Any]]] = {}
    newest: dict[str, float] = {}
    for log in records.stage_logs(project):
        logs.setdefault(str(log["run"]), []).append(log)
    for path in project.glob("runs/*/*.json"):
        newest[path.parent.name] = max(newest.get(path.parent.name, 0.0), path.stat().st_mtime)
    for run in sorted(newest, key=lambda name: (newest[name], name), reverse=True):
        if all(matches_record(project, log) for log in logs.get(run, ())):
            return run
    return ""


def matches_record(project: Path, log: dict[str, Any]) -> bool:
    """Whether a stage's log has the recipe of its current record; a log of another profile has not.

    A log without a recipe (stage `code`) always matches.
    """
    if "recipe" not in log:
        return True
    record = records.read_json(project / record_path(*_stage_and_key(str(log["stage"]))))
    return isinstance(record, dict) and record.get("recipe") == log.get("recipe")


def _stage_and_key(name: str) -> tuple[str, str | None]:
    stage, _, key = name.partition("@")
    return stage, key or None


def _as_float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
