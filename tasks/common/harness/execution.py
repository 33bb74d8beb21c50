"""Run one stage: `python -m tasks.STAGE [ENTRY]`, which is what `dvc.yaml` calls.

It checks all of `params.yaml`, computes the recipe, lets the stage write into a scratch folder, and moves the outputs
into place once all of them are complete, so that a partial output is never taken for a complete one. The identity is
written beside the outputs (`record.json`); measurements go to `runs/<run id>/<stage>.json`, which is not tracked.
"""

import errno
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from tasks.common import identity, model_folder, proxies
from tasks.common.code import stages
from tasks.common.harness import launch
from tasks.common.harness.job import (
    Job,
    Link,
    StageError,
    declared_inputs,
    declared_outputs,
    has_entries,
    metrics_path,
    reads_graph,
    record_path,
    stage_name,
    stage_of,
    uses_numerics,
)
from tasks.common.harness.launch import LAUNCHER_PID, rank
from tasks.common.harness.records import run_folder, write_json, write_run
from tasks.common.locks import LockHeldError, lock_file
from tasks.common.model_graph import entries_of, links_of
from tasks.common.overrides import sklearn_import
from tasks.common.params_file import check, config_of, sections_of
from tasks.common.raw_params import read_params
from tasks.common.settings import STAGES, Base, BessemerError, Numerics, Placement, Settings

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GX_ANALYTICS_ENABLED": "false",
}  # read at import time
SCRATCH_FOLDER = Path("data/.scratch")
LOCK_FOLDER = Path(".bessemer/stages")


def main(module_name: str) -> None:
    """Run the stage of a module from the command line; the exit code is 0 only if the stage is complete."""
    signal.signal(signal.SIGTERM, _interrupt)
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)
    proxies.exempt_loopback()
    module = _import(module_name)
    stage = stage_of(module)
    key = sys.argv[1] if len(sys.argv) > 1 else None
    if len(sys.argv) != 1 + has_entries(stage):
        raise SystemExit(f"usage: python -m {module_name.removesuffix('.stage')}{' ENTRY' * has_entries(stage)}")
    try:
        execute(module, key)
    except ModuleNotFoundError as error:
        raise SystemExit(_explain_missing_package(error)) from error
    except BessemerError as error:
        if int(os.environ.get("LOCAL_RANK", "0")):
            launch.wait_for_launcher()
        raise SystemExit(f"{stage_name(stage, key)}: {error}") from error
    except Exception as error:
        if launch.lost_peer(error):
            launch.wait_for_launcher()
        if not _disk_full(error):
            raise
        free = shutil.disk_usage(Path()).free / 1e6
        raise SystemExit(
            f"{stage_name(stage, key)}: the disk is full ({free:.0f} MB free). No partial output was kept: free some "
            "space (`dvc gc -w` removes old cached results) and start again."
        ) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _import(module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SystemExit(_explain_missing_package(error)) from error


def _explain_missing_package(error: ModuleNotFoundError) -> str:
    return (
        f"{sys.executable} has no package {error.name}: activate the project's environment (`source "
        ".venv/bin/activate`), or install the packages that it pins (`make install`)."
    )


def _disk_full(error: Exception) -> bool:
    """Return whether the disk or the quota is full; libraries in Rust report it only in the error's text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def execute(module: ModuleType, key: str | None) -> dict[str, Any]:
    """Run one stage in this process and return its record; raise SettingsError or StageError for user errors."""
    params, stage = read_params(), stage_of(module)
    check(params, stages=[stage_name(stage, key)])
    if key is not None and key not in entries_of(params, stage):
        known = ", ".join(entries_of(params, stage)) or "none"
        raise StageError(f"params.yaml has no entry {stage}.{key}; its entries are: {known}.")
    if LAUNCHER_PID in os.environ:
        launch.die_with_launcher(int(os.environ[LAUNCHER_PID]))
        return _execute(module, key, params)
    with _lock_stage(stage_name(stage, key)) if not rank() else nullcontext():
        return _execute(module, key, params)


def _execute(module: ModuleType, key: str | None, params: dict[str, Any]) -> dict[str, Any]:
    stage, seed = stage_of(module), Base.model_validate(params["base"]).seed
    section, config = config_of(module, params, key)
    sections = sections_of(module, params, key)
    numerics, links = Numerics.model_validate(params["numerics"]), links_of(params)
    inputs = {name: Path(path) for name, path in declared_inputs(module, key, config, links).items()}
    inputs = add_adapter_bases(inputs)
    absent = [str(path) for path in inputs.values() if not path.exists()]
    if absent:
        raise StageError(f"{', '.join(absent)} is missing: run `dvc repro {stage_name(stage, key)}`, which makes it.")
    launch.launch_processes(module, key, numerics)
    graph = links if reads_graph(module) else ()
    record = _build_record(module, stage, key, section, config, numerics, seed, inputs, graph, sections)
    targets = {name: Path(path) for name, path in declared_outputs(module, key).items()}
    with _scratch(stage_name(stage, key) + (f".{rank()}" if rank() else ""), targets) as outputs:
        placement = Placement.model_validate(params["placement"])
        started, clock = datetime.now(UTC), time.perf_counter()
        job = Job(
            stage, key, inputs, outputs, seed, numerics, record["recipe"], placement.checkpoints, placement.tracking,
            run_folder(started), placement.activation_checkpointing, placement.timeouts, placement.timed_tokens,
            sections=sections, parts=_recipe_parts(record), graph=graph,
        )  # fmt: skip
        if uses_numerics(module):
            sklearn_import.install()
        metrics = module.run(config, job)
        seconds = time.perf_counter() - clock
        _publish_outputs(job, targets, record, metrics)
    write_run(job, started, seconds)
    for call in job.when_complete:
        call()
    return record


def add_adapter_bases(inputs: dict[str, Path]) -> dict[str, Path]:
    """Return a stage's inputs with the base models of adapters, whose hashes belong to the recipe and the lineage."""
    bases = {name: model_folder.base_of(path) for name, path in inputs.items()}
    return inputs | {f"base of {name}": base for name, base in bases.items() if base != inputs[name]}


@contextmanager
def _lock_stage(name: str) -> Iterator[None]:
    """Hold the stage's lock; raise StageError if another process is running the stage.

    DVC's own lock is not enough: a `dvc repro` that was killed leaves its stage process running, and DVC then allows a
    second run.
    """
    LOCK_FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(LOCK_FOLDER / name):
            yield
    except LockHeldError as error:
        raise StageError(
            f"process {error.holder} is already running this stage in this folder. Wait until it has ended, or stop it "
            f"(`kill {error.holder}`); the next run resumes from its checkpoint."
        ) from None


@contextmanager
def _scratch(name: str, targets: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Yield a scratch path for each output; first remove what a killed run of this stage left behind."""
    # No "@" in the path: Optimum takes what follows it for the revision of a hub repository.
    scratch = SCRATCH_FOLDER / name.replace("@", "-")  # used by this stage only, which holds its lock
    shutil.rmtree(scratch, ignore_errors=True)
    outputs = {output: scratch / output / target.name for output, target in targets.items()}
    try:
        for path in outputs.values():
            path.parent.mkdir(parents=True)
        yield outputs
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish_outputs(job: Job, targets: dict[str, Path], record: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Hash the outputs, move them into place, and only then write the record and the metrics."""
    absent = [str(targets[name]) for name, path in job.outputs.items() if not path.exists()]
    if absent:
        raise RuntimeError(f"the stage did not write {', '.join(absent)}")
    record["outputs"] = {str(targets[name]): identity.tree_hash(path) for name, path in job.outputs.items()}
    record["content"] = identity.hash_json(record["outputs"])
    record_path(job.stage, job.key).unlink(missing_ok=True)  # no record exists until all outputs are in place
    for name, path in job.outputs.items():
        _move(path, targets[name])
    record["metrics"] = metrics
    write_json(record_path(job.stage, job.key), record)
    write_json(metrics_path(job.stage, job.key), metrics)


def _build_record(
    module: ModuleType, stage: str, key: str | None, section: str, config: Settings, numerics: Numerics, seed: int,
    inputs: dict[str, Path], graph: tuple[Link, ...], sections: dict[str, dict[str, Settings]],
) -> dict[str, Any]:  # fmt: skip
    # Digest the current code: the digest file that DVC tracks may be outdated if the stage was not started by DVC.
    code = stages.digest_code(stages.digest_module(module.__name__))
    parts: dict[str, Any] = {
        "code": code,
        "settings": config.model_dump(mode="json")
        | ({"graph": [list(link) for link in graph]} if graph else {})
        | {name: {key: one.model_dump(mode="json") for key, one in found.items()} for name, found in sections.items()},
        "numerics": numerics.model_dump(mode="json") if uses_numerics(module) else None,
        "seed": seed,
        "lock": identity.lock_hash(),
        "inputs": {str(path): identity.tree_hash(path) for path in inputs.values()},
    }
    recipe = identity.recipe(key=key, **parts)
    parts["code"] = {"digest": code, "detail": stages.digest_file(stage).as_posix()}
    named = {"stage": stage_name(stage, key), "section": section, "recipe": recipe, **parts}
    user_provided = {str(path): identity.file_hashes(path) for path in inputs.values() if _is_user_path(path)}
    return named | ({"user_provided": user_provided} if user_provided else {})


def _recipe_parts(record: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a recipe that a stage's own store of results is keyed by."""
    names = ("numerics", "seed", "lock", "inputs")
    return {"code": record["code"]["digest"], **{name: record[name] for name in names}}


def _is_user_path(path: Path) -> bool:
    """Return whether a path is the user's own: neither a source nor a stage's output."""
    return not any(path.is_relative_to(Path("data", name)) for name in ("sources", *STAGES))


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
