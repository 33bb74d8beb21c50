"""From sources to token shards: MB of text per second and core through `ingest`, `validate` and `tokenize`.

Run as `make bench-data` or `python -m benchmarks data`, on the default profile's sources, in a scratch project. The
archives come from this project's cache, so that no download is measured. The peer of `tokenize` is a standard
`datasets` pipeline (`benchmarks/datasets_tokenize.py`): train on the same texts, map, pack, save. Memory at a larger
corpus is measured on documents made of the same speeches (`benchmarks/corpus_growth.py`).
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import corpus_growth, harness
from benchmarks.harness import BenchmarkError, Figures, Measurements, Row
from tasks.common.defaults import read_settings

PROFILE = harness.ROOT / "profiles" / "default.yaml"
ARCHIVES = harness.ROOT / "data" / ".cache" / "archives"
STAGES = ("ingest", "validate", "tokenize")
PEER_NAME = "datasets + tokenizers"
COPIED_FOLDERS = ("tasks", "serving", "data/sources")
# Linux counts the parent's memory at the fork in a child's peak memory, so the parent is a small shell that waits.
SMALL_PARENT = '"$@"; exit $?'


def check() -> None:
    """Raise BenchmarkError if an archive is not in the cache."""
    wanted = [
        ARCHIVES / source["sha256"] for source in read_settings(PROFILE)["ingest"]["sources"] if "sha256" in source
    ]
    harness.require_paths(*wanted, remedy="run `bessemer run -s ingest` under the default profile first.")


def threads() -> int:
    """Return 1: the figures are per core."""
    return 1


def measure(*, trial: bool) -> Measurements:
    """Run the three stages and the peer of `tokenize` in turn, in a scratch project."""
    with project() as workdir:
        sides = {stage: partial(step, workdir, f"tasks.{stage}") for stage in STAGES}
        sides["peer"] = partial(step, workdir, "benchmarks.datasets_tokenize", str(vocabulary()))
        results = harness.alternate(sides, 1 if trial else 3)
        megabytes = {stage: text_bytes(workdir, stage) / 1e6 for stage in STAGES}
    measured = Measurements(notes=[f"text: {', '.join(f'{name} {size:.2f} MB' for name, size in megabytes.items())}"])
    for stage in STAGES:
        measured.rows += stage_rows(stage, megabytes[stage], results)
    measured.notes.append(harness.spread(results, "cpu_seconds"))
    corpus_growth.measure(measured, step, trial=trial)
    return measured


@contextmanager
def project() -> Iterator[Path]:
    """Yield a scratch project with the default profile, this project's code and its cached archives."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        workdir = Path(scratch)
        for name in COPIED_FOLDERS:
            shutil.copytree(harness.ROOT / name, workdir / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(harness.ROOT / "requirements.lock", workdir)
        shutil.copy(PROFILE, workdir / "params.yaml")
        (workdir / "data" / ".cache").mkdir()
        (workdir / "data" / ".cache" / "archives").symlink_to(ARCHIVES)
        yield workdir


def step(workdir: Path, module: str, *arguments: str) -> Figures:
    """Run a module in the scratch project; return its wall-clock and CPU seconds."""
    # The scratch project's code comes first on the path, as in a normal run of a stage; the peer is found after it.
    path = os.pathsep.join((str(workdir), str(harness.ROOT)))
    single_thread = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        ["sh", "-c", SMALL_PARENT, "sh", sys.executable, "-m", module, *arguments],
        cwd=workdir, env={**os.environ, **harness.OFFLINE, **single_thread, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise BenchmarkError(f"{module} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu}


def vocabulary() -> int:
    """Return the default profile's vocabulary size."""
    return int(read_settings(PROFILE)["tokenize"]["tokenizer"]["vocabulary"])


def text_bytes(workdir: Path, stage: str) -> int:
    """Return the bytes of text in the tables that a stage processes; `tokenize` does not read rankings."""
    source = workdir / "data" / ("ingest" if stage == "ingest" else "validate")
    tables = ("corpus", "instructions") if stage == "tokenize" else ("corpus", "instructions", "rankings")
    return sum(_bytes_of(row) for table in tables for row in _rows(source / table))


def _rows(folder: Path) -> list[dict[str, Any]]:
    from tasks.common import tables

    rows: list[dict[str, Any]] = tables.read(folder).to_pylist()
    return rows


def _bytes_of(row: dict[str, Any]) -> int:
    turns = [message["content"] for name in ("messages", "prompt") for message in row.get(name, [])]
    return sum(len(text.encode()) for text in (row.get("text", ""), *turns, *row.get("responses", [])))


def stage_rows(stage: str, megabytes: float, results: dict[str, list[Figures]]) -> list[Row]:
    """Return a stage's rate in CPU time (one core) and its wall-clock seconds."""

    def rate(side: str) -> float:
        return megabytes / harness.median(results[side], "cpu_seconds")

    seconds = {side: harness.median(found, "seconds") for side, found in results.items()}
    peer = {"peer_name": PEER_NAME} if stage == "tokenize" else {}
    rates, clocks = ({"peer": rate("peer")}, {"peer": seconds["peer"]}) if peer else ({}, {})
    return [
        Row(f"{stage}, start of the process included", rate(stage), "MB/s per core", **peer, **rates),  # type: ignore[arg-type]
        Row(f"{stage} by the clock", seconds[stage], "s", **peer, **clocks),  # type: ignore[arg-type]
    ]
