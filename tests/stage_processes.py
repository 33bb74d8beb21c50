"""Stages in processes of their own, in project folders of their own, as DVC and torchrun start them.

A fresh interpreter spends ten seconds on importing torch and Transformers, and the tests of resumed and of distributed
runs start about a hundred. `Ranks` are forked from a process that has imported them; they are killed like any other
process. `start_command` starts a fresh interpreter, for tests of the launcher.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows import graph
from tasks.common.harness import execution
from tasks.common.harness.job import module_of
from tasks.common.raw_params import read_params
from tests.conftest import copy_project
from tests.servers import free_port
from tests.training_fixtures import Chain, ignore_exporter_warnings

STEPS = 20
ITERATIONS = 10  # of `align`, which saves a checkpoint after each
SMALL = {"iterations": ITERATIONS, "episodes": 4, "minibatch": 2, "max_new_tokens": 8}
POLL_S = 0.002

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["tests.stage_imports"])


def clone(
    path: Path, chain: Chain, stage: str, changes: dict[str, Any], store: Path, every: float, *, processes: int = 1,
    engine: str = "data", dtype: str = "bfloat16",
) -> Path:  # fmt: skip
    """Copy the project and the toy chain's data, with settings for a few training steps; return the folder."""
    for needed in ("data/tokenize/shards", "data/pretrain/causal/model", "data/pretrain/masked/model"):
        chain.path(needed)
    for needed in ("data/finetune/chat/model", "data/reward/train/model") if stage == "align policy" else ():
        chain.path(needed)
    copy_project(path, "smoke")
    yaml, settings = YAML(), path / "params.yaml"
    params = yaml.load(settings.read_text(encoding="utf-8"))
    section = params
    for name in stage.split():
        section = section[name]
    if stage == "align policy":
        section |= SMALL
        section["algorithm"] |= {"ema_decay": 0.9, "ptx": {**section["algorithm"]["ptx"], "window": 16, "batch": 4}}
    else:
        section |= {"steps": STEPS, "window": 16, "batch": 4} if "window" in section else {"steps": STEPS, "batch": 4}
    section |= changes
    if "pretraining_mix" in section:
        section["pretraining_mix"]["window"] = 16
    params["numerics"]["dtype"] = {"decoder": dtype, "encoder": "float32"}
    params["numerics"]["parallel"] = {"processes": processes, "engine": engine}
    params["placement"]["checkpoints"] = {"url": str(store), "every_seconds": every}
    params["placement"]["tracking"] = {"to": []}  # DVCLive has a process of its own, which imports DVC
    with settings.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    with chain.lock:  # another worker may be writing to it
        shutil.copytree(chain.root / "data", path / "data", dirs_exist_ok=True)
    return path


class Ranks:
    """A function at work in one process or in several ranks of one group, as torchrun would start them.

    The function is called with the arguments and finds its rank in the environment. Its output is in files in `folder`.
    """

    def __init__(self, function: Callable[..., None], arguments: tuple[Any, ...], size: int, folder: Path) -> None:
        group = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self._outputs = [folder / f"output-{time.monotonic_ns()}-{rank}" for rank in range(size)]
        self._processes = []
        for rank, output in enumerate(self._outputs):
            torchrun = {"RANK": rank, "LOCAL_RANK": rank, **group} if size > 1 else {}
            environment = {**os.environ, **{name: str(value) for name, value in torchrun.items()}}
            process = _forking.Process(target=_call, args=(function, arguments, environment, output))
            process.start()
            self._processes.append(process)

    def poll(self) -> int | None:
        """Return the exit code of a failed process, or 0 when all have ended well; None while they run."""
        codes = [process.exitcode for process in self._processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def kill(self) -> None:
        """Send SIGKILL to every process and wait until they have ended."""
        for process in self._processes:
            process.kill()
        self.wait()

    def wait(self) -> str:
        """Wait for the end and return the output. Where one process fails, the others are killed, as by torchrun."""
        while self.poll() is None:
            time.sleep(POLL_S)
        for process in self._processes:
            process.kill()
            process.join()
        return "".join(output.read_text(encoding="utf-8") for output in self._outputs if output.exists())

    def finish(self) -> str:
        """Wait for the end, which must be a good one, and return the output."""
        output = self.wait()
        assert self.poll() == 0, output
        return output


def _call(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], output: Path) -> None:
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.environ.update(environment)
    function(*arguments)


def start(folder: Path, stage: str) -> Ranks:
    """Start a stage in a project folder, in as many processes as the settings there name."""
    size = YAML(typ="safe").load(folder / "params.yaml")["numerics"]["parallel"]["processes"]
    return Ranks(_run_stage, (folder, stage), size, folder)


def _run_stage(folder: Path, stage: str) -> None:
    """Do what `python -m tasks.STAGE ENTRY` does."""
    os.chdir(folder)
    os.environ["BESSEMER_RUN_ID"] = "test"
    module, *entry = stage.split()
    sys.argv = [module, *entry]
    execution.main(f"tasks.{module}.stage")


def run_to_end(folder: Path, stage: str) -> str:
    """Run a stage to its end and return its output."""
    return start(folder, stage).finish()


def start_command(folder: Path, stage: str) -> "subprocess.Popen[str]":
    """Start a stage in a fresh interpreter, with the command and the code that DVC would take."""
    command = [sys.executable, "-m", *f"tasks.{stage}".split()]
    environment = {**os.environ, "PYTHONPATH": str(folder), "BESSEMER_RUN_ID": "test"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def checkpoint_steps(store: Path) -> list[int]:
    """Return the steps of the checkpoints in a store."""
    return [int(path.name) for path in store.glob("*/*/*") if path.name.isdigit()]


def wait_for_step(at: int, store: Path, process: "Ranks | subprocess.Popen[str]") -> None:
    """Wait until a process has saved a checkpoint of a step, or of a later one."""
    while not any(step >= at for step in checkpoint_steps(store)):
        assert process.poll() is None, f"the stage ended before step {at}"
        time.sleep(POLL_S)


def run_graph(folder: Path) -> list[str]:
    """Run every stage but `code` of a project, the current folder, in the order of DVC's graph; return their names.

    Stages run in this process; those that train run in as many processes as the settings name.
    """
    processes = read_params(folder / "params.yaml")["numerics"].get("parallel", {}).get("processes", 1)
    names = [name for name in graph.read(folder) if name != "code" and not name.endswith(".dvc")]
    with ignore_exporter_warnings():
        for name in names:
            stage, _, key = name.partition("@")
            module = module_of(stage)
            if processes > 1 and getattr(module, "PARALLEL", False):
                run_to_end(folder, f"{stage} {key}")
            else:
                execution.execute(module, key or None)
    return names
