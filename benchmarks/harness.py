"""Shared by the benchmarks: rows with targets, result files, subprocesses, and alternating measurements.

A result file has figures with their command, commit, hardware, versions and date. Ours and the peer are measured in
turn (A B A B), so that a slowdown of the machine affects both; the median of the rounds counts. A target is a text like
`>= 0.9`, `<= 5` or `ratio >= 4`. A missed target is reported and is not an error.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.common.harness.records import write_json
from tasks.common.settings import BessemerError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGET_PATTERN = re.compile(r"(ratio )?(>=|<=) (\d+(?:\.\d+)?)")
RESULT_KEYS = ("name", "command", "commit", "date", "hardware", "versions", "rows", "notes")
ROW_KEYS = ("what", "ours", "peer", "peer_name", "unit", "ratio", "target", "met")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "BENTOML_DO_NOT_TRACK": "True"}


class BenchmarkError(BessemerError):
    """A prerequisite of a benchmark is missing, or a run failed; the message says what to do."""


@dataclass(frozen=True)
class Row:
    """One figure, optionally with the peer's figure and a target. `ours` is None if it was not measured."""

    what: str
    ours: float | None
    unit: str
    peer: float | None = None
    peer_name: str | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        if self.target is not None and not TARGET_PATTERN.fullmatch(self.target):
            raise ValueError(f"{self.what}: the target {self.target!r} is not like '>= 0.9', '<= 5' or 'ratio >= 4'")
        if (self.peer is None) != (self.peer_name is None):
            raise ValueError(f"{self.what}: a peer needs a name and a figure")

    @property
    def ratio(self) -> float | None:
        """Ours / peer: above 1 is better for speeds, below 1 for seconds and bytes."""
        return self.ours / self.peer if self.ours is not None and self.peer else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met, or None without a target. A figure that was not measured misses it."""
        found = TARGET_PATTERN.fullmatch(self.target or "")
        if not found:
            return None
        value, limit = self.ratio if found[1] else self.ours, float(found[3])
        return value is not None and (value >= limit if found[2] == ">=" else value <= limit)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as in the result file."""
        values = {"ours": _short(self.ours), "peer": _short(self.peer), "ratio": _short(self.ratio), "met": self.met}
        return {key: values.get(key, getattr(self, key)) for key in ROW_KEYS}


@dataclass
class Measurements:
    """The rows of a benchmark, and notes about how they were measured."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _short(value: float | None) -> float | None:
    """Round a float to four significant digits; leave an int unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(
    name: str,
    measured: Measurements,
    surroundings: Mapping[str, Any],
    folder: Path = RESULTS,
    *,
    file: str | None = None,
    now: datetime | None = None,
) -> Path:
    """Write a result file, by default named after the benchmark, and return its path."""
    result = {
        "name": name,
        "command": f"python -m benchmarks {name}",
        "date": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        **surroundings,
        "rows": [row.to_dict() for row in measured.rows],
        "notes": measured.notes,
    }
    path = folder / f"{file or name}.json"
    write_json(path, {key: result[key] for key in RESULT_KEYS})
    return path


def find_problems(result: Any) -> list[str]:
    """Return the problems of a result file's contents; an empty list if it is valid."""
    if not isinstance(result, dict) or tuple(result) != RESULT_KEYS:
        return [f"expected the keys {', '.join(RESULT_KEYS)}"]
    texts = [key for key in ("name", "command", "commit", "date") if not isinstance(result[key], str)]
    found = [f"{key} is not a string" for key in texts]
    found += [f"{key} is empty" for key in ("hardware", "versions", "rows") if not result[key]]
    for row in result["rows"]:
        if tuple(row) != ROW_KEYS:
            found.append(f"{row.get('what')}: expected the keys {', '.join(ROW_KEYS)}")
            continue
        try:
            row_check = Row(row["what"], row["ours"], row["unit"], row["peer"], row["peer_name"], row["target"])
        except ValueError as error:
            found.append(str(error))
            continue
        if row_check.met is not row["met"]:
            found.append(f"{row['what']}: met is {row['met']}, but its figures give {row_check.met}")
    return found


def print_results(measured: Measurements) -> None:
    """Print rows and notes."""
    for row in measured.rows:
        plain = row.to_dict()
        peer = f"   {row.peer_name} {_text(plain['peer'])}   ratio {_text(plain['ratio'])}" if row.peer_name else ""
        verdict = {None: "", True: f"   target {row.target}: met", False: f"   target {row.target}: MISSED"}[row.met]
        print(f"  {row.what}: {_text(plain['ours'])} {row.unit}{peer}{verdict}")
    for note in measured.notes:
        print(f"    {note}")
    sys.stdout.flush()


def _text(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


Figures = dict[str, Any]


def alternate(sides: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """Measure all sides once per round, in turn; return each side's figures by round."""
    results: dict[str, list[Figures]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, measure in sides.items():
            figures = measure()
            results[name].append(figures)
            summary = ", ".join(
                f"{key} {value:,.4g}" for key, value in figures.items() if isinstance(value, (int, float))
            )
            print(f"    round {number + 1} of {rounds}, {name}: {summary}", flush=True)
    return results


def median(rounds: Sequence[Figures], figure: str) -> float:
    """Return the median of a figure over one side's rounds."""
    return float(statistics.median(item[figure] for item in rounds))


def spread(results: Mapping[str, Sequence[Figures]], figure: str) -> str:
    """Return a note with the figure of every round, to show the variation."""
    sides = (f"{name} " + " ".join(f"{item[figure]:.4g}" for item in rounds) for name, rounds in results.items())
    return f"{figure}, round by round: " + "; ".join(sides)


def run_module(module: str, request: Mapping[str, Any], *, killed: bool = False, timeout: float = 1800) -> Figures:
    """Run `python -m MODULE FILE` in a new process and return the contents of its result file.

    FILE is the request as JSON, plus the start time (`started`, monotonic clock) and the result's path (`result`). With
    `killed` the process must end with SIGKILL, and the result is empty. Raise BenchmarkError if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        request_file, result = Path(scratch, "request.json"), Path(scratch, "result.json")
        content = {**request, "result": str(result), "started": time.monotonic()}
        request_file.write_text(json.dumps(content), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", module, str(request_file)],
            cwd=ROOT, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if killed and done.returncode == -9:
            return {}
        if done.returncode or killed:
            raise BenchmarkError(f"{module} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
        figures: Figures = json.loads(result.read_text(encoding="utf-8"))
        return figures


def read_request() -> dict[str, Any]:
    """Return the request of a process that `run_module` started."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return request


def require_paths(*paths: Path, remedy: str) -> None:
    """Raise BenchmarkError if one of the paths is missing."""
    absent = [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
    if absent:
        raise BenchmarkError(f"{', '.join(absent)} is missing: {remedy}")
