"""Several processes that train one model: the same curve as one, by either engine, and resumed as one."""

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_resume import LORA, clone, finished, start, steps
from tests.training_fixtures import Chain, chain

__all__ = ["chain"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def curve(folder: Path, stage: str) -> list[float]:
    """Return the losses of a run."""
    with Path(folder, "data", *stage.split(), "history.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("stage", "engine", "changes"),
    [
        ("pretrain clm", "data", {}),
        ("pretrain clm", "fsdp", {}),
        ("pretrain mlm", "fsdp", {}),
        ("finetune", "fsdp", {"method": LORA}),
        ("reward", "data", {}),
    ],
)
def test_two_processes_learn_as_one(
    stage: str, engine: str, changes: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """The same batches in two parts: what differs is the order of float32 sums, which 40 steps carry on.

    A sum of n terms in another order differs by about √n × 6e-8 of its size; the curves of 40 steps of this model were
    seen to differ by up to 2e-5.
    """
    one = clone(tmp_path / "one", chain, stage, changes, tmp_path / "none", 1e9, dtype="float32")
    two = clone(
        tmp_path / "two", chain, stage, changes, tmp_path / "none", 1e9, dtype="float32", processes=2, engine=engine
    )
    finished(one, stage)
    finished(two, stage)
    assert curve(two, stage) == pytest.approx(curve(one, stage), rel=2e-4)
    (log,) = (two / "runs/test").glob("*.json")
    assert json.loads(log.read_text())["stage"] == "@".join(stage.split())


def test_two_processes_are_resumed(chain: Chain, tmp_path: Path) -> None:
    """Shared out, killed outright and begun again, they end with the bytes of two that were not."""
    stage, store = "pretrain clm", tmp_path / "store"
    whole = clone(tmp_path / "whole", chain, stage, {}, tmp_path / "none", 1e9, processes=2, engine="fsdp")
    again = clone(tmp_path / "again", chain, stage, {}, store, 1e-9, processes=2, engine="fsdp")
    finished(whole, stage)
    process = start(again, stage)
    while not any(step >= 7 for step in steps(store)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun's, which ends its processes
    process.communicate()
    said = finished(again, stage)
    assert "resuming at step" in said
    path = "data/pretrain/clm/model/model.safetensors"
    assert (again / path).read_bytes() == (whole / path).read_bytes()
