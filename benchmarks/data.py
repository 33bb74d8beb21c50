"""From sources to token shards: MB of text a second and core through `ingest`, `validate` and `tokenize`.

Run as `make bench-data` or `python -m benchmarks data`, on the default profile's own sources, in a scratch project. The
archives come from this project's cache, so that no download is measured. The peer of `tokenize` is the usual way with
`datasets` (`benchmarks/datasets_tokenize.py`): train on the same texts, map, pack, save. How speed and memory go with
the size of the corpus is measured on the same speeches, all of them many times over (`benchmarks/corpus_growth.py`).
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
from benchmarks.harness import BenchmarkError, Figures, Measured, Row
from tasks.common.settings import read_params

PROFILE = harness.ROOT / "profiles" / "default.yaml"
ARCHIVES = harness.ROOT / "data" / ".cache" / "archives"
STAGES = ("ingest", "validate", "tokenize")
PEER = "datasets + tokenizers"
COPIED = ("tasks", "serving", "data/sources")
# Linux counts what the parent held at the start to a process's peak memory; a shell that stays holds next to nothing.
SMALL_PARENT = '"$@"; exit $?'


def check() -> None:
    """Raise BenchmarkError where an archive would have to be downloaded."""
    wanted = [ARCHIVES / source["sha256"] for source in read_params(PROFILE)["ingest"]["sources"] if "sha256" in source]
    harness.needed(*wanted, remedy="run `bessemer run -s ingest` under the default profile first.")


def threads() -> int:
    """Return one: what is asked is what one core does."""
    return 1


def measure(*, trial: bool) -> Measured:
    """Run the three stages and the peer of the third in turn, in a scratch project."""
    with project() as place:
        sides = {stage: partial(step, place, f"tasks.{stage}") for stage in STAGES}
        sides["peer"] = partial(step, place, "benchmarks.datasets_tokenize", str(vocabulary()))
        results = harness.alternate(sides, 1 if trial else 3)
        megabytes = {stage: text_bytes(place, stage) / 1e6 for stage in STAGES}
    measured = Measured(notes=[f"text: {', '.join(f'{name} {size:.2f} MB' for name, size in megabytes.items())}"])
    for stage in STAGES:
        measured.rows += stage_rows(stage, megabytes[stage], results)
    measured.notes.append(harness.spread(results, "cpu_seconds"))
    corpus_growth.measure(measured, step, trial=trial)
    return measured


@contextmanager
def project() -> Iterator[Path]:
    """Yield a scratch project with the default profile, this project's code and its cached archives."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        place = Path(scratch)
        for name in COPIED:
            shutil.copytree(harness.ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(harness.ROOT / "requirements.lock", place)
        shutil.copy(PROFILE, place / "params.yaml")
        (place / "data" / ".cache").mkdir()
        (place / "data" / ".cache" / "archives").symlink_to(ARCHIVES)
        yield place


def step(place: Path, module: str, *arguments: str) -> Figures:
    """Run a module in the scratch project and return its seconds, by the clock and of its processor."""
    # The project's own code comes first on the path, as in a stage's ordinary run; the peer is found behind it.
    path = os.pathsep.join((str(place), str(harness.ROOT)))
    one = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        ["sh", "-c", SMALL_PARENT, "sh", sys.executable, "-m", module, *arguments],
        cwd=place, env={**os.environ, **harness.OFFLINE, **one, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise BenchmarkError(f"{module} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu}


def vocabulary() -> int:
    """Return the size of the default profile's vocabulary."""
    return int(read_params(PROFILE)["tokenize"]["tokenizer"]["vocabulary"])


def text_bytes(place: Path, stage: str) -> int:
    """Return the bytes of text that a stage has to do with: all of its tables; of rankings, `tokenize` reads none."""
    source = place / "data" / ("ingest" if stage == "ingest" else "validate")
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
    """Return a stage's rate by its processor time (one core), and its seconds by the clock."""

    def rate(side: str) -> float:
        return megabytes / harness.median(results[side], "cpu_seconds")

    seconds = {side: harness.median(found, "seconds") for side, found in results.items()}
    peer = {"peer_name": PEER} if stage == "tokenize" else {}
    rates, clocks = ({"peer": rate("peer")}, {"peer": seconds["peer"]}) if peer else ({}, {})
    return [
        Row(f"{stage}, start of the process included", rate(stage), "MB/s per core", **peer, **rates),  # type: ignore[arg-type]
        Row(f"{stage} by the clock", seconds[stage], "s", **peer, **clocks),  # type: ignore[arg-type]
    ]
