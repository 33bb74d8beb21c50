"""A stage killed at a random step resumes from its last checkpoint in another clone, to the same bytes."""

import random
from pathlib import Path
from typing import Any

import pytest

from tasks.common import identity
from tests.stage_processes import ITERATIONS, STEPS, checkpoint_steps, clone, run_to_end, start, wait_for_step
from tests.training_fixtures import ALTERNATIVES, LORA, PRETRAINING_MIX, Chain, chain

__all__ = ["chain"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STAGES: list[tuple[str, dict[str, Any]]] = [
    ("pretrain causal", {}),
    ("pretrain masked", {}),
    ("finetune chat", {"method": {**LORA, "dropout": 0.1}}),
    ("reward train", {}),
    ("align policy", {}),
    ("align policy", {"method": LORA}),
    ("align policy", {"algorithm": {**ALTERNATIVES["grpo"], "ptx": PRETRAINING_MIX}}),  # DPO and RLOO use the same code
]


@pytest.mark.parametrize(("stage", "changes"), STAGES)
def test_resume_after_kill_in_other_clone_gives_same_bytes(
    stage: str, changes: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """`kill -9` at a random step, then the same stage in a second clone that shares only the store."""
    steps = ITERATIONS if stage == "align policy" else STEPS
    store, kill_step = tmp_path / "store", random.randrange(1, steps - 5)
    whole = clone(tmp_path / "whole", chain, stage, changes, tmp_path / "none", 1e9)
    first, second = (clone(tmp_path / name, chain, stage, changes, store, 1e-9) for name in ("first", "second"))
    run_to_end(whole, stage)
    process = start(first, stage)
    wait_for_step(kill_step, store, process)
    process.kill()
    reached = max(checkpoint_steps(store))
    assert reached < steps, f"the stage was not killed in time, at step {kill_step}"
    output = run_to_end(second, stage)
    assert f"resuming at step {reached} " in output
    model = Path("data", *stage.split(), "model")
    assert identity.tree_hash(second / model) == identity.tree_hash(whole / model), f"killed at step {reached}"
    assert checkpoint_steps(store) == []
