"""The harness that runs one stage: `python -m tasks.STAGE [KEY]`, which is what `dvc.yaml` calls.

It checks all of `params.yaml`, computes the recipe, lets the stage write into a scratch folder, and moves the finished
outputs into place in one go, so that half an output never passes for a whole one. What bears identity is written
beside the outputs (`record.json`); what was measured goes to `runs/<run id>/<stage>.json`, which nothing tracks.
"""

import ctypes
import errno
import fcntl
import importlib
import json
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from tasks.common import identity
from tasks.common.settings import (
    BessemerError,
    Checkpoints,
    Numerics,
    Placement,
    Settings,
    Tracking,
    check,
    config_of,
    read_params,
)

RUN_ID = "BESSEMER_RUN_ID"
LAUNCHER = "BESSEMER_LAUNCHER"  # the process that started this one as one of several that train together
SCRATCH = Path("data/.scratch")
LOCKS = Path(".bessemer/stages")
RUNS = Path("runs")
FIRST_SAYS_S = 10.0  # within which the first process has met an error that it shares with the others
LEFT_BY_RUNS = ("benchmarks/results", "docs", "dvc.lock", "metrics")  # tracked, and no part of what is run


class StageError(BessemerError):
    """A stage cannot go on, for a reason that the user can mend; its text says what was found and what to do."""


NOT_TRACKED = Tracking(to=[], every=1)  # of a job that was not made by `execute`


@dataclass(frozen=True)
class Job:
    """What a stage's `run` is given: where to read, where to write, and what bears on its bytes."""

    stage: str
    key: str | None
    inputs: dict[str, Path]
    outputs: dict[str, Path]
    seed: int
    numerics: Numerics
    recipe: str
    checkpoints: Checkpoints
    tracking: Tracking = NOT_TRACKED
    run_folder: Path = RUNS / "manual"
    figures: dict[str, Any] = field(default_factory=dict)
    when_complete: list[Callable[[], None]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The stage's name in DVC, in the Prefect UI and in every record: `pretrain@clm`."""
        return name_of(self.stage, self.key)

    def measured(self, **figures: float | int | str) -> None:
        """Keep figures about how this run went (speed, memory, time). They never enter a tracked output."""
        self.figures.update(figures)


def name_of(stage: str, key: str | None) -> str:
    """Return `stage` or `stage@key`."""
    return stage if key is None else f"{stage}@{key}"


def declared_inputs(module: ModuleType, key: str | None, config: Settings) -> dict[str, str]:
    """Return the data that a stage reads, name to project path; a path may hang on the stage's settings."""
    per_key: dict[str, dict[str, str]] = getattr(module, "KEY_INPUTS", {})
    inputs: dict[str, str] = {**module.INPUTS, **(per_key[key] if key is not None and per_key else {})}
    return {name: path.format(key=key, config=config) for name, path in inputs.items()}


def declared_outputs(module: ModuleType, key: str | None) -> dict[str, str]:
    """Return the data that a stage leaves, name to project path, without its record and metrics."""
    outputs: dict[str, str] = module.OUTPUTS
    return {name: path.format(key=key) for name, path in outputs.items()}


def computes(module: ModuleType) -> bool:
    """Return whether a stage computes with a model, so that `numerics` bear on its bytes."""
    return bool(getattr(module, "NUMERICS", True))


def record_path(stage: str, key: str | None) -> Path:
    """Return where a stage's record lies."""
    return Path("data", stage, key or "", "record.json")


def metrics_path(stage: str, key: str | None) -> Path:
    """Return where a stage's deterministic figures lie; the joined table of all models is `metrics/evaluate.json`."""
    return Path("metrics", "evaluate.json" if stage == "compare" else f"{name_of(stage, key)}.json")


def keys_of(module: ModuleType) -> tuple[str | None, ...]:
    """Return the keys that a stage module may be run with; `(None,)` for a stage that has none."""
    return tuple(getattr(module, "KEYS", None) or getattr(module, "KEY_INPUTS", None) or (None,))


def main(module_name: str) -> None:
    """Run the stage of a module from the command line, and end with exit code 0 only where it is complete."""
    signal.signal(signal.SIGTERM, _interrupt)
    module = importlib.import_module(module_name)
    keys = keys_of(module)
    key = sys.argv[1] if len(sys.argv) > 1 else None
    if key not in keys or len(sys.argv) > 2:
        choices = " | ".join(str(item) for item in keys if item is not None)
        raise SystemExit(f"usage: python -m {module_name} {choices}".rstrip())
    try:
        execute(module, key)
    except BessemerError as error:
        if int(os.environ.get("LOCAL_RANK", "0")):
            _leave_it_to_the_first()
        raise SystemExit(f"{name_of(module_name.rpartition('.')[2], key)}: {error}") from error
    except Exception as error:
        if not _disk_full(error):
            raise
        free = shutil.disk_usage(Path()).free / 1e6
        raise SystemExit(
            f"{name_of(module_name.rpartition('.')[2], key)}: the disk is full ({free:.0f} MB free). Nothing half-"
            "written was kept: free some space (`dvc gc -w` drops old cached results) and start again."
        ) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _leave_it_to_the_first() -> None:
    """Wait for the launcher to end this process: what is wrong here is wrong in all; a machine's first says it.

    Where the first goes on, this one's own error was the only one, and this returns.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(FIRST_SAYS_S)


def _disk_full(error: Exception) -> bool:
    """Return whether an error says that the disk or the quota is full; libraries in Rust say so in words alone."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def execute(module: ModuleType, key: str | None) -> dict[str, Any]:
    """Run one stage in this process and return its record; raise SettingsError or StageError for the user's errors."""
    params, stage = read_params(), module.__name__.rpartition(".")[2]
    check(params, stages=[name_of(stage, key)])
    if LAUNCHER in os.environ:
        _die_with(int(os.environ[LAUNCHER]))
        return _execute(module, key, params)
    with _alone(name_of(stage, key)) if not rank() else nullcontext():
        return _execute(module, key, params)


def _execute(module: ModuleType, key: str | None, params: dict[str, Any]) -> dict[str, Any]:
    stage, seed = module.__name__.rpartition(".")[2], params["base"]["seed"]
    section, config = config_of(module, params, key)
    numerics = Numerics.model_validate(params["numerics"])
    inputs = {name: Path(path) for name, path in declared_inputs(module, key, config).items()}
    absent = [str(path) for path in inputs.values() if not path.exists()]
    if absent:
        raise StageError(f"{', '.join(absent)} is missing; `dvc repro {name_of(stage, key)}` makes it first.")
    _gather_processes(module, key, numerics)
    record = _describe(module, stage, key, section, config, numerics, seed, inputs)
    targets = {name: Path(path) for name, path in declared_outputs(module, key).items()}
    with _scratch(name_of(stage, key) + (f".{rank()}" if rank() else ""), targets) as outputs:
        placement = Placement.model_validate(params["placement"])
        started, clock = datetime.now(UTC), time.perf_counter()
        job = Job(
            stage, key, inputs, outputs, seed, numerics, record["recipe"], placement.checkpoints, placement.tracking,
            run_folder(started),
        )  # fmt: skip
        metrics = module.run(config, job)
        seconds = time.perf_counter() - clock
        _finish(job, targets, record, metrics)
    _write_run(job, started, seconds)
    for call in job.when_complete:
        call()
    return record


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Work on a stage alone; raise StageError where another process still does.

    Whoever started that one may be gone (a `dvc repro` that was killed outright leaves its stage at work), and DVC then
    lets a second run begin. The system drops the lock with the process that holds it.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    with (LOCKS / name).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise StageError(
                f"process {holder} is at work on this stage here, although nobody may be waiting for it any more. Wait "
                f"until it has ended, or stop it (`kill {holder}`); what it has learnt is taken up from its last "
                "checkpoint."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _die_with(launcher: int) -> None:
    """Have the system end this process when its launcher ends, however that does: nobody would end it later."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:  # Linux alone
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != launcher:
        raise SystemExit(f"the launcher of this process, {launcher}, is gone")


def rank() -> int:
    """Return this process's number among those that train a model together; the first, 0, is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def _gather_processes(module: ModuleType, key: str | None, numerics: Numerics) -> None:
    """Become torchrun where several processes are to train and no launcher has started them; else go on.

    Raises StageError where another number of them was started than the settings say, or more than find a device here.
    """
    processes, name = numerics.parallel.processes, name_of(module.__name__.rpartition(".")[2], key)
    started = "RANK" in os.environ
    if not getattr(module, "PARALLEL", False):
        if started:
            raise StageError(f"{name} does not train, so one process does it: start it without a launcher.")
        return
    size = int(os.environ.get("WORLD_SIZE", "1")) if started else processes
    if size != processes:
        raise StageError(
            f"{size} processes were started, but numerics.parallel.processes is {processes}: make them equal. The "
            "number is part of the model's identity, because it changes the order of sums."
        )
    must_find_devices(int(os.environ.get("LOCAL_WORLD_SIZE", size)) if started else processes, numerics.device)
    if processes > 1 and not started:
        os.environ["OMP_NUM_THREADS"] = str(numerics.threads)
        _torchrun(name, processes, [module.__name__, *([key] if key else [])])


def _torchrun(name: str, processes: int, command: Sequence[str]) -> NoReturn:
    """Run a module in several processes under torchrun, and end as they end, with their words and none of its own."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # it tells every failure twice
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        run.main(["--standalone", f"--nproc-per-node={processes}", "-m", *command])
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            killed = f"was killed by {signal.Signals(-failure.exitcode).name}; the run can be resumed"
            raise SystemExit(f"{name}: process {number} of {processes} {killed}.") from None
        raise SystemExit(failure.exitcode) from None
    except SignalException:
        raise SystemExit(130) from None
    raise SystemExit(0)


def must_find_devices(processes: int, device: str) -> None:
    """Refuse more processes on this machine than it has devices.

    On a CPU that is a core each, whatever `threads` says: more threads than cores are slow, but a model that was made
    on a larger machine can so be made again here.
    """
    if processes == 1:
        return  # what one process lacks, `models.prepare_torch` tells
    if device == "cuda":
        import torch

        found, what = torch.cuda.device_count(), "GPUs"
    else:
        found, what = len(os.sched_getaffinity(0)), "cores"
    if processes > found:
        raise StageError(
            f"{processes} processes are to train on this machine, which lets this one use {found} {what}, and each "
            f"needs one of its own: set numerics.parallel.processes to {max(found, 1)} or less, or start torchrun on "
            "several machines (docs/training.md)."
        )


@contextmanager
def _scratch(name: str, targets: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Yield a scratch path for each output; drop what a run of this stage that was killed outright left behind."""
    scratch = SCRATCH / name  # the stage's own, which works alone
    shutil.rmtree(scratch, ignore_errors=True)
    outputs = {output: scratch / output / target.name for output, target in targets.items()}
    try:
        for path in outputs.values():
            path.parent.mkdir(parents=True)
        yield outputs
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _finish(job: Job, targets: dict[str, Path], record: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Hash the outputs, move them into place, and only then write the record and the metrics."""
    absent = [str(targets[name]) for name, path in job.outputs.items() if not path.exists()]
    if absent:
        raise RuntimeError(f"the stage ended without writing {', '.join(absent)}")
    record["outputs"] = {str(targets[name]): identity.tree_hash(path) for name, path in job.outputs.items()}
    record["content"] = identity.hash_json(record["outputs"])
    record_path(job.stage, job.key).unlink(missing_ok=True)  # from here on there is none until all outputs are in place
    for name, path in job.outputs.items():
        _move(path, targets[name])
    write_json(record_path(job.stage, job.key), record)
    write_json(metrics_path(job.stage, job.key), metrics)


def _describe(
    module: ModuleType, stage: str, key: str | None, section: str, config: Settings, numerics: Numerics, seed: int,
    inputs: dict[str, Path],
) -> dict[str, Any]:  # fmt: skip
    code = {str(path): identity.file_hash(path) for path in identity.code_files(module.__name__)}
    parts: dict[str, Any] = {
        "code": code,
        "settings": config.model_dump(mode="json"),
        "numerics": numerics.model_dump(mode="json") if computes(module) else None,
        "seed": seed,
        "lock": identity.lock_hash(),
        "inputs": {str(path): identity.tree_hash(path) for path in inputs.values()},
    }
    return {"stage": name_of(stage, key), "section": section, "recipe": identity.recipe(key=key, **parts), **parts}


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all: to a neighbour first, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbour = path.with_name(f".{path.name}.{os.getpid()}")
    neighbour.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    neighbour.replace(path)


def _write_run(job: Job, started: datetime, seconds: float) -> None:
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
    """Return the most memory that this process has held, in bytes.

    Where there is one, it is asked of Linux's own page: the other count begins with what the parent held.
    """
    page = Path("/proc/self/status")
    for line in page.read_text(encoding="utf-8").splitlines() if page.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_folder(started: datetime) -> Path:
    """Return where a run keeps what was measured: the flow's, or one of its own for a stage started by hand."""
    return RUNS / (os.environ.get(RUN_ID) or started.strftime("manual-%Y%m%d-%H%M%S"))


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

    status = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in LEFT_BY_RUNS))
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
