"""Several processes that train one model: the same curve as one, by either engine, and resumed as one."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.conftest import ROOT
from tests.test_resume import clone, finished, start, wait_for_step
from tests.training_fixtures import LORA, RULE, RULES, Chain, chain

__all__ = ["chain"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What differs is the order of float32 sums, which the steps carry on. A sum of n terms in another order differs by
# about √n × 6e-8 of its size; the curves of 40 steps were seen to differ by 2e-5.
TOLERANCE = 2e-4
PACKED = {"name": "chat", "answers": "all", "packing": 48}


def curve(folder: Path, stage: str) -> list[float]:
    """Return the losses of a run."""
    with Path(folder, "data", *stage.split(), "history.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def names(folder: Path, stage: str) -> set[str]:
    """Return the names of a saved model's weights."""
    with safe_open(Path(folder, "data", *stage.split(), "model/model.safetensors"), "numpy") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    ("stage", "engine", "changes"),
    [
        ("pretrain clm", "data", {}),
        ("pretrain mlm", "fsdp", {}),
        ("finetune", "fsdp", {"method": LORA}),
        ("finetune", "fsdp", {"method": {"name": "adapter", "width": 4}, "task": PACKED}),
        ("reward policy", "data", {}),
        ("pretrain clm", "tensor", {}),
        ("pretrain clm", "zero2", {"accumulate": 2}),
        ("pretrain mlm", "zero3", {}),
        ("finetune", "zero3", {"method": LORA, "accumulate": 2}),
        ("reward policy", "zero2", {}),
    ],
)
def test_two_processes_learn_as_one(
    stage: str, engine: str, changes: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """The same batches in two parts, in float32."""
    one = clone(tmp_path / "one", chain, stage, changes, tmp_path / "none", 1e9, dtype="float32")
    two = clone(
        tmp_path / "two", chain, stage, changes, tmp_path / "none", 1e9, dtype="float32", processes=2, engine=engine
    )
    finished(one, stage)
    finished(two, stage)
    assert curve(two, stage) == pytest.approx(curve(one, stage), rel=TOLERANCE)
    assert names(two, stage) == names(one, stage)
    (log,) = (two / "runs/test").glob("*.json")
    assert json.loads(log.read_text())["stage"] == "@".join(stage.split())


@pytest.mark.parametrize(
    ("engine", "changes"),
    [("fsdp", {}), ("zero2", {"optimizer": {"name": "lion", **RULE, **RULES["lion"]}}), ("zero3", {})],
)
def test_two_processes_are_resumed(engine: str, changes: dict[str, Any], chain: Chain, tmp_path: Path) -> None:
    """Shared out, they learn as one does; killed and begun again, they end with the bytes of two that were not."""
    stage, store, none = "pretrain clm", tmp_path / "store", tmp_path / "none"
    one = clone(tmp_path / "one", chain, stage, changes, none, 1e9, dtype="float32")
    whole, again = (
        clone(tmp_path / name, chain, stage, changes, *kept, dtype="float32", processes=2, engine=engine)
        for name, kept in {"whole": (none, 1e9), "again": (store, 1e-9)}.items()
    )
    finished(one, stage)
    finished(whole, stage)
    assert curve(whole, stage) == pytest.approx(curve(one, stage), rel=TOLERANCE)
    process = start(again, stage)
    wait_for_step(7, store, process)
    process.send_signal(signal.SIGTERM)  # torchrun's, which ends its processes
    process.communicate()
    said = finished(again, stage)
    assert "resuming at step" in said
    path = "data/pretrain/clm/model/model.safetensors"
    assert (again / path).read_bytes() == (whole / path).read_bytes()


def test_what_is_wrong_is_said_once(chain: Chain, tmp_path: Path) -> None:
    """By one of the processes, and without torchrun's own account of it."""
    mixture = {"mixture": {"statements": 0.5, "verse": 0.5}}
    folder = clone(tmp_path, chain, "pretrain clm", mixture, tmp_path / "none", 1e9, processes=2)
    process = start(folder, "pretrain clm")
    said, _ = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(r"pretrain@clm: .*verse.*\n", said)


def two_at_work(chain: Chain, tmp_path: Path) -> "tuple[Path, subprocess.Popen[str], list[str]]":
    """Return a folder in which two processes have begun to train, their launcher, and its children's numbers."""
    folder = clone(tmp_path, chain, "pretrain clm", {}, store := tmp_path / "store", 1e-9, processes=2)
    process = start(folder, "pretrain clm")
    wait_for_step(1, store, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return folder, process, children


def test_a_process_that_is_killed_is_named(chain: Chain, tmp_path: Path) -> None:
    """The machine's memory ran out, say: nothing else would tell."""
    _, process, children = two_at_work(chain, tmp_path)
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 1
    assert re.search(r"^pretrain@clm: process [01] of 2 was killed by SIGKILL; the run can be resumed\.$", said, re.M)
    assert "Traceback" not in said


def test_processes_end_with_their_launcher(chain: Chain, tmp_path: Path) -> None:
    """However that ends: they would go on with nobody waiting, beside those of the next run."""
    folder, process, children = two_at_work(chain, tmp_path)
    process.kill()
    process.communicate()
    reached = time.monotonic() + 30
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < reached, "processes outlived their launcher"
        time.sleep(0.05)
    assert "resuming at step" in finished(folder, "pretrain clm")


def test_what_all_processes_read_is_named_where_the_loss_is_no_number(chain: Chain, tmp_path: Path) -> None:
    """Not what the first of them read alone: the others' windows may be the cause."""
    wild = {"name": "sgd", **RULE, **RULES["sgd"], "learning_rate": 10.0, "clip": 1e30}
    wild |= {"momentum": 0.99, "schedule": {"name": "constant", "warmup": 0.0}}
    changes = {"optimizer": wild, "steps": 300, "batch": 16}
    folder = clone(tmp_path, chain, "pretrain clm", changes, tmp_path / "store", 1e9, processes=2)
    process = start(folder, "pretrain clm")
    said, _ = process.communicate()
    assert process.returncode == 1
    found = re.search(r"The batch: (.*) and 4 more, all of which (\S+) names", said)
    assert found, said
    all_of_it = (folder / found[2]).read_text(encoding="utf-8").splitlines()
    numbers = sorted(int(name.removeprefix("window ")) for name in all_of_it)
    assert numbers == list(range(numbers[0], numbers[0] + 16))
    assert found[1].split(", ") == all_of_it[:12]


@pytest.mark.parametrize(("engine", "method"), [("data", {"name": "full"}), ("fsdp", {"name": "full"}), ("fsdp", LORA)])
def test_two_processes_update_a_policy_as_one(
    engine: str, method: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """On the same replies, half of them each, in float32."""
    request = {"method": method, "engine": engine, "data": str(chain.root / "data"), "iteration": 0}
    chain.path("data/finetune/model")
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "request.json").write_text(json.dumps({**request, "processes": processes}), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(Path(__file__).with_name("one_update.py"))]
        done = subprocess.run(
            [*command, str(folder)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with safe_open(folder / "weights.safetensors", "numpy") as file:
            weights.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert np.abs(value - weights[1][name]).max() < 2e-6, name
    assert any(name.endswith("value_head.weight") and value.any() for name, value in weights[0].items())


@pytest.mark.parametrize(("engine", "changes"), [("data", {"method": LORA}), ("fsdp", {})])
def test_two_processes_align_a_policy_and_are_resumed(
    engine: str, changes: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """Killed and begun again, they end with the bytes of two that were not."""
    store, none = tmp_path / "store", tmp_path / "none"
    whole, again = (
        clone(tmp_path / name, chain, "ppo", changes, *kept, processes=2, engine=engine)
        for name, kept in {"whole": (none, 1e9), "again": (store, 1e-9)}.items()
    )
    finished(whole, "ppo")
    process = start(again, "ppo")
    wait_for_step(7, store, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert "resuming at step" in finished(again, "ppo")
    path = "data/ppo/model/model.safetensors"
    assert (again / path).read_bytes() == (whole / path).read_bytes()
