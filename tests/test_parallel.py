"""Distributed training: every engine gives the curve of a single process, and runs resume to the same bytes."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.stage_processes import Ranks, clone, run_to_end, start, start_command, wait_for_step
from tests.training_fixtures import BASE_OPTIMIZER, LORA, OPTIMIZER_OPTIONS, Chain, chain

__all__ = ["chain"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Only the order of float32 sums differs, and the difference grows over the steps. A sum of n terms in another order
# differs by about √n × 6e-8 of its size; curves of 40 steps differed by up to 2e-5 (20 steps are run here).
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
        ("pretrain causal", "data", {}),
        ("pretrain masked", "fsdp", {}),
        ("finetune chat", "fsdp", {"method": LORA}),
        ("finetune chat", "fsdp", {"method": {"name": "adapter", "width": 4}, "task": PACKED}),
        ("reward train", "data", {}),
        ("pretrain causal", "tensor", {}),
        ("pretrain causal", "zero2", {"gradient_accumulation_steps": 2}),
        ("pretrain masked", "zero3", {}),
        ("finetune chat", "zero3", {"method": LORA, "gradient_accumulation_steps": 2}),
        ("reward train", "zero2", {}),
    ],
)
def test_two_processes_match_single_process(
    stage: str, engine: str, changes: dict[str, Any], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same batches split in two, in float32. No engine needs a C++ compiler."""
    extensions = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    one = clone(tmp_path / "one", chain, stage, changes, tmp_path / "none", 1e9, dtype="float32")
    two = clone(
        tmp_path / "two", chain, stage, changes, tmp_path / "none", 1e9, dtype="float32", processes=2, engine=engine
    )
    run_to_end(one, stage)
    run_to_end(two, stage)
    assert curve(two, stage) == pytest.approx(curve(one, stage), rel=TOLERANCE)
    assert names(two, stage) == names(one, stage)
    assert not extensions.exists()
    (log,) = (two / "runs/test").glob("*.json")
    assert json.loads(log.read_text())["stage"] == "@".join(stage.split())


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("fsdp", {}),
        ("zero2", {"optimizer": {"name": "lion", **BASE_OPTIMIZER, **OPTIMIZER_OPTIONS["lion"]}}),
        ("zero3", {}),
    ],
)
def test_two_processes_are_resumed(engine: str, changes: dict[str, Any], chain: Chain, tmp_path: Path) -> None:
    """Two processes give the curve of one; killed and resumed, they give the bytes of an uninterrupted run."""
    stage, store, none = "pretrain causal", tmp_path / "store", tmp_path / "none"
    one = clone(tmp_path / "one", chain, stage, changes, none, 1e9, dtype="float32")
    whole, again = (
        clone(tmp_path / name, chain, stage, changes, *checkpoint, dtype="float32", processes=2, engine=engine)
        for name, checkpoint in {"whole": (none, 1e9), "again": (store, 1e-9)}.items()
    )
    run_to_end(one, stage)
    run_to_end(whole, stage)
    assert curve(whole, stage) == pytest.approx(curve(one, stage), rel=TOLERANCE)
    process = start(again, stage)
    wait_for_step(7, store, process)
    process.kill()
    output = run_to_end(again, stage)
    assert "resuming at step" in output
    path = "data/pretrain/causal/model/model.safetensors"
    assert (again / path).read_bytes() == (whole / path).read_bytes()


def test_settings_error_is_printed_once(chain: Chain, tmp_path: Path) -> None:
    """One process prints it, and torchrun adds nothing."""
    mixture = {"mixture": {"stories": 1.0}}  # a source of the settings that has no text in the chain's corpus
    folder = clone(tmp_path, chain, "pretrain causal", mixture, tmp_path / "none", 1e9, processes=2)
    process = start_command(folder, "pretrain causal")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(r"pretrain@causal: the mixture names stories, but the corpus has no such text.*\n", output)


def start_two_processes(chain: Chain, tmp_path: Path) -> "tuple[Path, subprocess.Popen[str], list[str]]":
    """Start training in two processes; return its folder, the launcher and the PIDs of the launcher's children."""
    folder = clone(tmp_path, chain, "pretrain causal", {}, store := tmp_path / "store", 1e-9, processes=2)
    process = start_command(folder, "pretrain causal")
    wait_for_step(1, store, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return folder, process, children


def test_killed_process_is_reported(chain: Chain, tmp_path: Path) -> None:
    """For example, the kernel kills a process when memory runs out, without a message.

    The other process notices it first, because the launcher is stopped for a second.
    """
    _, process, children = start_two_processes(chain, tmp_path)
    process.send_signal(signal.SIGSTOP)
    os.kill(int(children[-1]), signal.SIGKILL)
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate()
    assert process.returncode == 1
    assert re.search(
        r"^pretrain@causal: process [01] of 2 was killed by SIGKILL; the run can be resumed\.$", output, re.M
    )
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_launcher(number: signal.Signals, chain: Chain, tmp_path: Path) -> None:
    """Even if it is killed: else they would continue beside the processes of the next run."""
    folder, process, children = start_two_processes(chain, tmp_path)
    process.send_signal(number)
    process.communicate()
    reached = time.monotonic() + 30
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < reached, "processes outlived their launcher"
        time.sleep(0.05)
    assert "resuming at step" in run_to_end(folder, "pretrain causal")


def test_non_finite_loss_lists_rows_of_all_processes(chain: Chain, tmp_path: Path) -> None:
    """The cause may be in the rows of any process."""
    diverging = {
        "name": "sgd",
        **BASE_OPTIMIZER,
        **OPTIMIZER_OPTIONS["sgd"],
        "learning_rate": 10.0,
        "max_grad_norm": 1e30,
    }
    diverging |= {"momentum": 0.99, "schedule": {"name": "constant", "warmup": 0.0}}
    changes = {"optimizer": diverging, "steps": 300, "batch": 16}
    folder = clone(tmp_path, chain, "pretrain causal", changes, tmp_path / "store", 1e9, processes=2)
    process = start(folder, "pretrain causal")
    output = process.wait()
    assert process.poll() == 1
    match = re.search(r"The batch: (.*) and 4 more \(full list: (\S+)\)", output)
    assert match, output
    lines = (folder / match[2]).read_text(encoding="utf-8").splitlines()
    numbers = sorted(int(name.removeprefix("window ")) for name in lines)
    assert numbers == list(range(numbers[0], numbers[0] + 16))
    assert match[1].split(", ") == lines[:12]


@pytest.mark.parametrize(("engine", "method"), [("data", {"name": "full"}), ("fsdp", {"name": "full"}), ("fsdp", LORA)])
def test_two_processes_update_policy_like_one(
    engine: str, method: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """On the same replies, half of them in each process, in float32."""
    from tests.one_update import update_policy

    request = {"method": method, "engine": engine, "data": str(chain.root / "data"), "iteration": 0}
    chain.path("data/finetune/chat/model")
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "request.json").write_text(json.dumps({**request, "processes": processes}), encoding="utf-8")
        Ranks(update_policy, (folder,), processes, folder).finish()
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
    """Killed and resumed, they give the bytes of an uninterrupted run."""
    store, none = tmp_path / "store", tmp_path / "none"
    whole, again = (
        clone(tmp_path / name, chain, "align policy", changes, *checkpoint, processes=2, engine=engine)
        for name, checkpoint in {"whole": (none, 1e9), "again": (store, 1e-9)}.items()
    )
    run_to_end(whole, "align policy")
    process = start(again, "align policy")
    wait_for_step(3, store, process)
    process.kill()
    assert "resuming at step" in run_to_end(again, "align policy")
    path = "data/align/policy/model/model.safetensors"
    assert (again / path).read_bytes() == (whole / path).read_bytes()
