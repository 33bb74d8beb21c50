"""A profile from text to the endpoint, in a fresh project: time of every stage, training speed, memory, figures.

`benchmarks/gpu_profile.py` and `benchmarks/multi_gpu_profile.py` name the profile and the GPUs it needs. The project is
a copy of this one's code and data with the profile as its `params.yaml`; `bessemer run` and `bessemer serve` do the
rest. Archives that this project has downloaded are copied too, so a machine without a network can run it. Failed gates
do not stop it: they are a row of the record.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import endpoint, harness, machine, pipeline
from benchmarks.harness import BenchmarkError, Measurements, Row
from benchmarks.pipeline import CompleteRun
from benchmarks.profile_twin import make_twin, read_profile, write_params
from flows.start import project as projects

COMMAND = (sys.executable, "-c", "from flows.cli import main; main()")
QUESTION = "What is the capital of Peru?"
SOURCES, ARCHIVES = "data/sources", "data/.cache/archives"
MAX_SECONDS = 600  # of the whole chain
FIGURES = {  # of the scorecard, with their units
    "parameters": "parameters", "bits_per_byte": "bits per byte", "exact_match_seen": "share",
    "exact_match_heldout": "share", "abstained_out_of_scope": "share", "abstained_in_scope": "share",
}  # fmt: skip


def measure(profile: str, min_gpus: int, *, trial: bool) -> Measurements:
    """Run a profile and return its rows; as a trial with too few GPUs, its CPU-sized twin."""
    found = machine.gpu_count()
    if found < min_gpus and not trial:
        raise BenchmarkError(
            f"the profile {profile} needs {min_gpus} GPU(s), torch finds {found}: use a machine with them, or test the "
            "script with --trial."
        )
    params = read_profile(profile)
    if found < min_gpus:
        params = make_twin(params)
    elif min_gpus > 1:
        params["numerics"]["parallel"]["processes"] = largest_power_of_two(found)  # batches are divisible by it
    params["package"]["refuse_failed_gates"] = False
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        project = create(Path(scratch, "project"), params)
        run(project)
        whole = pipeline.last_complete_run(project)
        if whole is None:
            raise BenchmarkError(f"the run of {profile} is incomplete: {project} lacks the log of a stage")
        rows = [*run_rows(whole), *training_rows(whole, project), *quality_rows(project), answer_row(project)]
    used = params["numerics"].get("parallel", {}).get("processes", 1)
    return Measurements(rows, [f"{used} process(es) on {params['numerics']['device']}; {found} GPU(s) in the machine."])


def largest_power_of_two(limit: int) -> int:
    """Return the largest power of two that is at most `limit` (≥ 1)."""
    return 1 << (limit.bit_length() - 1)


def create(folder: Path, params: dict[str, Any]) -> Path:
    """Create a project of this code, its data and the settings, with one commit; return its folder."""
    with projects.new_project(folder) as project:
        shutil.copytree(harness.ROOT / SOURCES, project / SOURCES, dirs_exist_ok=True)
        if (harness.ROOT / ARCHIVES).is_dir():
            shutil.copytree(harness.ROOT / ARCHIVES, project / ARCHIVES)
        write_params(project / "params.yaml", params)
        projects.commit(project, [], "the profile")
    return folder


def run(project: Path) -> None:
    """Run the chain; raise BenchmarkError with the end of its output if a stage fails."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # of `python` in dvc.yaml
    done = subprocess.run(
        [*COMMAND, "run"], cwd=project, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BenchmarkError(f"`bessemer run` ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def run_rows(whole: CompleteRun) -> Iterator[Row]:
    """Yield the time of the chain and of its stages, and the memory of the machine."""
    yield Row("text to endpoint: the chain from nothing, and the build", whole.seconds, "s", target=f"<= {MAX_SECONDS}")
    for log in sorted(whole.stages, key=pipeline.start_time):
        yield Row(f"time, {log['stage']}", log["seconds"], "s")
    yield Row("peak memory of stages at the same time", pipeline.concurrent_peak_memory(whole.stages) / 1e9, "GB")


def training_rows(whole: CompleteRun, project: Path) -> Iterator[Row]:
    """Yield speed, model FLOPs utilisation and the device's peak memory of each stage that trains."""
    for log in whole.stages:
        if "tokens_per_second" not in log:
            continue
        name = log["stage"]
        yield Row(f"training speed, {name}", log["tokens_per_second"], "tokens/s")
        if "mfu" in log:
            yield Row(f"model FLOPs utilisation, {name}", log["mfu"], "of the peak")
        tracked = project / "runs" / whole.name / "tracking" / name / "dvclive" / "metrics.json"
        if tracked.exists():  # of process 0: all processes of a stage do the same
            memory = json.loads(tracked.read_text(encoding="utf-8"))["peak_memory_bytes"]
            yield Row(f"peak memory of a process on its device, {name}", memory / 1e9, "GB")


def quality_rows(project: Path) -> Iterator[Row]:
    """Yield the figures of every model in the scorecard, and the gates that failed."""
    scorecard = json.loads((project / "metrics/evaluate.json").read_text(encoding="utf-8"))
    for model in scorecard["models"]:
        for figure, unit in FIGURES.items():
            if model.get(figure) is not None:
                yield Row(f"{figure}, {model['model']}", model[figure], unit)
    yield Row("gates failed", sum(not gate["passed"] for gate in scorecard["gates"]), "gates", target="<= 0")


def answer_row(project: Path) -> Row:
    """Serve the package and return the seconds to the first answer."""
    with endpoint.run_server(endpoint.BESSEMER_COMMAND, QUESTION, project=project) as (_, seconds):
        return Row("`bessemer serve` to the first answer", seconds, "s")
