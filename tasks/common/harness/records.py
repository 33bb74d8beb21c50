"""Files about a run: atomically written JSON, the run's log, and the commit that was checked out."""

import json
import os
import platform
import resource
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

from tasks.common.harness.job import RUNS_FOLDER, Job

RUN_ID_VARIABLE = "BESSEMER_RUN_ID"
RUN_OUTPUTS = (
    "benchmarks/results",
    "docs",
    "dvc.lock",
    "metrics",
)  # tracked paths whose changes do not make a run "dirty"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: to a temporary file in the same folder, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_run(job: Job, started: datetime, seconds: float) -> None:
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    log = {
        "stage": job.name,
        "recipe": job.recipe,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": max(peak_memory(), children),
        "host": platform.node(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **commit(),
        **job.figures,
    }
    write_json(job.run_folder / f"{job.name}.json", log)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes.

    On Linux it comes from /proc/self/status, because `getrusage` starts from the parent's memory.
    """
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_folder(started: datetime) -> Path:
    """Return the folder of a run's measurements: the flow's, or a new one for a stage that was started by hand."""
    return RUNS_FOLDER / (os.environ.get(RUN_ID_VARIABLE) or started.strftime("manual-%Y%m%d-%H%M%S"))


def commit(folder: Path = Path()) -> dict[str, Any]:
    """Return the commit checked out in a folder and whether code or settings differ from it; None without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in RUN_OUTPUTS))
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
