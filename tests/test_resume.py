"""A stage that is killed outright at a random step goes on from its last checkpoint, in another clone of the project,
and ends with the bytes of a run in one go."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks.common import identity
from tests.conftest import copy_project
from tests.training_fixtures import ALTERNATIVES, LORA, MIX, Chain, chain

__all__ = ["chain"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 40
STAGES: list[tuple[str, dict[str, Any]]] = [
    ("pretrain clm", {}),
    ("pretrain mlm", {}),
    ("finetune", {"method": {**LORA, "dropout": 0.1}}),
    ("reward policy", {}),
    ("ppo", {}),
    ("ppo", {"method": LORA}),
    ("ppo", {"algorithm": {**ALTERNATIVES["grpo"], "ptx": MIX}}),  # the other alternatives take the same way
]
SMALL = {"iterations": STEPS, "episodes": 4, "minibatch": 2, "max_new_tokens": 8}  # of ppo, whose steps are iterations


def clone(
    path: Path, chain: Chain, stage: str, changes: dict[str, Any], store: Path, every: float, *, processes: int = 1,
    engine: str = "data", dtype: str = "bfloat16",
) -> Path:  # fmt: skip
    """Return a folder with the project, the toy chain's data, and settings that train a stage for a few steps."""
    for needed in ("data/tokenize/shards", "data/pretrain/clm/model", "data/pretrain/mlm/model"):
        chain.path(needed)
    for needed in ("data/finetune/model", "data/reward/policy/model") if stage == "ppo" else ():
        chain.path(needed)
    copy_project(path, "smoke")
    yaml, settings = YAML(), path / "params.yaml"
    params = yaml.load(settings.read_text(encoding="utf-8"))
    section = params
    for name in stage.split():
        section = section.get(name, section)  # both reward models share theirs
    if stage == "ppo":
        section |= SMALL
        section["algorithm"] |= {"average": 0.9, "ptx": {**section["algorithm"]["ptx"], "window": 16, "batch": 4}}
    else:
        section |= {"steps": STEPS, "window": 16, "batch": 4} if "window" in section else {"steps": STEPS, "batch": 4}
    section |= changes
    if "mix" in section:
        section["mix"]["window"] = 16
    params["numerics"]["dtype"] = {"decoder": dtype, "encoder": "float32"}
    params["numerics"]["parallel"] = {"processes": processes, "engine": engine}
    params["placement"]["checkpoints"] = {"url": str(store), "every_seconds": every}
    with settings.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    shutil.copytree(chain.root / "data", path / "data", dirs_exist_ok=True)
    return path


def start(folder: Path, stage: str) -> "subprocess.Popen[str]":
    """Start a stage as DVC would."""
    command = [sys.executable, "-m", *f"tasks.{stage}".split()]
    environment = {**os.environ, "PYTHONPATH": str(folder), "BESSEMER_RUN_ID": "test"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(folder: Path, stage: str) -> str:
    """Run a stage to its end and return what it said."""
    process = start(folder, stage)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def steps(store: Path) -> list[int]:
    """Return the steps of the checkpoints in a store."""
    return [int(path.name) for path in store.glob("*/*/*") if path.name.isdigit()]


def wait_for_step(at: int, store: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a process has kept a checkpoint of a step, or of a later one."""
    while not any(step >= at for step in steps(store)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.mark.parametrize(("stage", "changes"), STAGES)
def test_killed_anywhere_and_resumed_elsewhere_is_uninterrupted(
    stage: str, changes: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """`kill -9` at a random step, then the same stage in a second clone that shares nothing but the store."""
    store, at = tmp_path / "store", random.randrange(1, STEPS - 5)
    whole = clone(tmp_path / "whole", chain, stage, changes, tmp_path / "none", 1e9)
    first, second = (clone(tmp_path / name, chain, stage, changes, store, 1e-9) for name in ("first", "second"))
    finished(whole, stage)
    process = start(first, stage)
    wait_for_step(at, store, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = max(steps(store))
    assert reached < STEPS, f"the stage was not killed in time, at step {at}"
    said = finished(second, stage)
    assert f"resuming at step {reached} " in said
    output = Path("data", *stage.split(), "model")
    assert identity.tree_hash(second / output) == identity.tree_hash(whole / output), f"killed at step {reached}"
    assert steps(store) == []
