"""Reward-hacking alarms: what sets them off, which policy is kept, and what the stage then does."""

import csv
from pathlib import Path
from typing import Any

import pytest

from tasks import ppo
from tasks.common import tables
from tasks.common.alignment.alarms import Alarms, Sheet, Watch
from tasks.common.modelling import models
from tasks.common.stage import StageError
from tests.training_fixtures import NUMERICS, PROXIMAL, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

BOUNDS: dict[str, Any] = {
    "every": 2, "questions": 4, "exact_match_drop": 0.1, "kl": 10.0, "length": 2.0, "distinct_2": 0.5,
    "action": "rollback",
}  # fmt: skip
FIRST = {"reward": 0.0, "kl": 0.0, "length": 10.0, "distinct_2": 0.8, "exact_match": 0.9}


def watch() -> Watch:
    """Return a watch that has seen a first look."""
    found = Watch(Alarms(**BOUNDS))
    assert found.look(0, dict(FIRST), lambda: {"number": 0}) == []  # type: ignore[dict-item]
    return found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"reward": 1.0}, []),
        ({"reward": 1.0, "exact_match": 0.81}, []),
        ({"reward": 1.0, "exact_match": 0.79}, ["exact match 90.0 → 79.0 %"]),
        ({"reward": -1.0, "exact_match": 0.0}, []),  # bad, but no reward is gamed
        ({"reward": 1.0, "length": 19.0}, []),
        ({"reward": 1.0, "length": 21.0}, ["length 10.0 → 21.0 tokens"]),
        ({"reward": 1.0, "length": 4.0}, ["length 10.0 → 4.0 tokens"]),
        ({"reward": 1.0, "distinct_2": 0.39}, ["distinct-2 0.80 → 0.39"]),
        ({"reward": -1.0, "kl": 11.0}, ["KL 11.0 nats a reply"]),
        (
            {"reward": 1.0, "length": 21.0, "exact_match": 0.5},
            ["exact match 90.0 → 50.0 %", "length 10.0 → 21.0 tokens"],
        ),
    ],
)
def test_an_alarm_is_a_higher_reward_with_something_out_of_bounds(change: dict[str, float], told: list[str]) -> None:
    """Too much KL is one whatever the reward."""
    assert watch().look(2, {**FIRST, **change}, dict) == told


def test_what_is_kept_passed_with_the_most_reward() -> None:
    """Not the last one, nor one that an alarm went off for."""
    ours = watch()
    for iteration, change in enumerate(
        ({"reward": 2.0}, {"reward": 1.5}, {"reward": 9.0, "exact_match": 0.0}, {"reward": 1.0}), 1
    ):
        ours.look(iteration, {**FIRST, **change}, lambda number=iteration: {"number": number})  # type: ignore[misc]
    assert (ours.best_iteration, ours.best_reward) == (1, 2.0)
    assert dict(ours.best) == {"number": 1}


def test_looks_are_every_few_iterations_and_at_the_end() -> None:
    """The first of all is what the others are compared with."""
    ours = Watch(Alarms(**BOUNDS))
    assert [iteration for iteration in range(6) if ours.due(iteration, 5)] == [0, 2, 4, 5]


def test_without_questions_the_other_bounds_hold() -> None:
    """A table without short answers gives no sheet."""
    ours, first = Watch(Alarms(**BOUNDS)), {name: FIRST[name] for name in FIRST if name != "exact_match"}
    ours.look(0, dict(first), dict)
    assert ours.look(2, {**first, "reward": 1.0}, dict) == []
    assert ours.look(2, {**first, "reward": 1.0, "length": 99.0}, dict) != []


def test_the_sheet_is_of_held_out_questions(chain: Chain) -> None:
    """With short answers; right is what the sheet of all models calls right."""
    table = tables.read(chain.path("data/validate/instructions")).to_pylist()
    sheet = Sheet.of(table, 3, lambda row: True)
    assert len(sheet.questions) == 3
    assert {row["entity"] for row in sheet.rows} <= {"Kenya", "Peru"}
    replies = [f"The capital of {row['entity']} is {row['answer']}." for row in sheet.rows]
    assert sheet.right(replies) == 1.0
    assert sheet.right(["The capital of Kenya is Lima.", *replies[1:]]) == pytest.approx(2 / 3)
    assert Sheet.of([], 3, lambda row: True).questions == []


# The stage

OWN = """
def rate(prompts, replies):
    return [2.0 if "obviously" in reply else -2.0 for reply in replies]
"""


def gamed(chain: Chain, folder: Path, action: str) -> tuple[dict[str, Any], Any]:
    """Run PPO on a reward that likes one tone until it is far from the tuned model; return metrics and job."""
    (folder / "mine.py").write_text(OWN, encoding="utf-8")
    free = {"estimator": "k1", "coefficient": 0.0, "target": 6.0, "horizon": 0, "stop": None}
    base = config("ppo")
    settings = config(
        "ppo", iterations=12, episodes=32, minibatch=16, algorithm={**PROXIMAL, "kl": free},
        reward={"name": "function", "path": str(folder / "mine.py"), "function": "rate", "timeout": 60.0},
        alarms={**base.alarms.model_dump(), "every": 1, "kl": 4.0, "action": action},
        optimizer={**base.optimizer.model_dump(), "learning_rate": 1e-3},
    )  # fmt: skip
    job = chain.job("ppo", settings, folder)
    return ppo.run(settings, job), job


def test_rollback_ends_with_the_best_policy_that_passed(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures are the metrics' last, and its weights are what is saved."""
    metrics, job = gamed(chain, tmp_path, "rollback")
    with job.outputs["history"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert 1 < len(rows) < 13
    assert float(rows[-1]["kl"]) > 4.0
    kept = metrics["rolled_back_to"]
    assert metrics["reward_last"] == float(rows[kept]["reward"]) == max(float(row["reward"]) for row in rows[:-1])
    assert metrics["kl_last"] <= 4.0
    said = capsys.readouterr().out
    assert f"KL {float(rows[-1]['kl']):.1f} nats a reply. The policy goes back to that of iteration {kept}" in said
    tuned = models.load_decoder(chain.path("data/finetune/model"), NUMERICS)
    saved = models.load_decoder(job.outputs["model"], NUMERICS)
    assert any((a != b).any() for a, b in zip(saved.parameters(), tuned.parameters(), strict=True))


def test_stop_is_an_error_that_says_what_to_change(chain: Chain, tmp_path: Path) -> None:
    """And leaves no model."""
    with pytest.raises(StageError, match=r"alarm at iteration \d+: reward .* but KL .*ppo\.algorithm\.kl\.coefficient"):
        gamed(chain, tmp_path, "stop")
    assert not (tmp_path / "model/model").exists()
