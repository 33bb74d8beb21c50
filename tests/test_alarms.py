"""Reward-hacking alarms: conditions, the weights that are kept, and the stage's reaction."""

import csv
from pathlib import Path
from typing import Any

import pytest

from tasks.align import stage as align
from tasks.align.alarms import AlarmMonitor, Alarms, Scorecard, Weights
from tasks.align.proximal import PpoTrainer
from tasks.common import tables
from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.text import chat
from tests.training_fixtures import NUMERICS, PPO, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

BOUNDS: dict[str, Any] = {
    "every": 2, "questions": 4, "max_exact_match_drop": 0.1, "max_kl": 10.0, "max_length_ratio": 2.0,
    "min_distinct_2_ratio": 0.5,
    "action": "rollback",
}  # fmt: skip
BASELINE = {
    "reward": 0.0, "kl": 0.0, "length": 10.0, "distinct_2": 0.8, "repetition": 0.1, "exact_match": 0.9,
    "answer_loss": 2.0,
}  # fmt: skip


def make_monitor() -> AlarmMonitor:
    """Return a monitor with a baseline."""
    monitor = AlarmMonitor(Alarms(**BOUNDS))
    assert monitor.check(0, dict(BASELINE), lambda: {"number": 0}) == []  # type: ignore[dict-item]
    return monitor


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"reward": 1.0}, []),
        ({"reward": 1.0, "exact_match": 0.81}, []),
        ({"reward": 1.0, "exact_match": 0.79}, ["exact match 90.0 → 79.0 %"]),
        ({"reward": -1.0, "exact_match": 0.0}, []),  # bad, but no reward is gamed
        ({"reward": 1.0, "length": 19.0}, []),
        ({"reward": 1.0, "length": 21.0}, ["length 10.0 → 21.0 tokens"]),
        ({"reward": 1.0, "length": 4.0}, ["length 10.0 → 4.0 tokens"]),
        ({"reward": 1.0, "distinct_2": 0.39}, ["distinct-2 0.80 → 0.39"]),
        ({"reward": 1.0, "repetition": 0.29, "answer_loss": 2.9}, []),
        ({"reward": 1.0, "repetition": 0.31}, ["repetition 0.10 → 0.31"]),
        ({"reward": 1.0, "answer_loss": 3.1}, ["loss of reference answers 2.00 → 3.10"]),
        ({"reward": -1.0, "answer_loss": 9.0, "repetition": 0.9}, []),
        ({"reward": -1.0, "kl": 11.0}, ["KL 11.0 nats per reply"]),
        (
            {"reward": 1.0, "length": 21.0, "exact_match": 0.5},
            ["exact match 90.0 → 50.0 %", "length 10.0 → 21.0 tokens"],
        ),
    ],
)
def test_alarm_needs_higher_reward_and_a_value_out_of_bounds(change: dict[str, float], expected: list[str]) -> None:
    """Too much KL raises an alarm whatever the reward."""
    assert make_monitor().check(2, {**BASELINE, **change}, dict) == expected


def test_best_weights_have_the_highest_passing_reward() -> None:
    """The last weights and those of an alarm are not kept."""
    ours = make_monitor()
    for iteration, change in enumerate(
        ({"reward": 2.0}, {"reward": 1.5}, {"reward": 9.0, "exact_match": 0.0}, {"reward": 1.0}), 1
    ):
        ours.check(iteration, {**BASELINE, **change}, lambda number=iteration: {"number": number})  # type: ignore[misc]
    assert (ours.best_iteration, ours.best_reward) == (1, 2.0)
    assert dict(ours.best_weights) == {"number": 1}


def test_checks_run_every_few_iterations_and_at_the_end() -> None:
    """The first check is the baseline."""
    ours = AlarmMonitor(Alarms(**BOUNDS))
    assert [iteration for iteration in range(6) if ours.due(iteration, 5)] == [0, 2, 4, 5]


def test_alarms_without_questions_check_the_other_bounds() -> None:
    """A table without short answers has no questions."""
    ours, first = AlarmMonitor(Alarms(**BOUNDS)), {name: BASELINE[name] for name in BASELINE if name != "exact_match"}
    ours.check(0, dict(first), dict)
    assert ours.check(2, {**first, "reward": 1.0}, dict) == []
    assert ours.check(2, {**first, "reward": 1.0, "length": 99.0}, dict) != []


def test_the_scorecard_has_heldout_questions(chain: Chain) -> None:
    """They have short answers; accuracy is the scorecard's exact match."""
    table = tables.read(chain.path("data/validate/instructions")).to_pylist()
    card = Scorecard.of(table, 3, lambda row: True)
    assert len(card.questions) == 3
    assert {row["entity"] for row in card.rows} <= {"Kenya", "Peru"}
    replies = [f"The capital of {row['entity']} is {row['answer']}." for row in card.rows]
    assert card.accuracy(replies) == 1.0
    assert card.accuracy(["The capital of Kenya is Lima.", *replies[1:]]) == pytest.approx(2 / 3)
    assert card.references == []
    assert Scorecard.of([], 3, lambda row: True).questions == []


def test_without_short_answers_held_out_conversations_are_the_references(chain: Chain) -> None:
    """Questions without answers are no questions of exact match."""
    table = [{**row, "answer": None} for row in tables.read(chain.path("data/validate/instructions")).to_pylist()]
    card = Scorecard.of(table, 3, lambda row: True)
    assert card.questions == []
    assert len(card.references) == 3
    assert {row["split"] for row in card.references} == {"heldout"}


def test_answer_loss_of_an_alignment_without_short_answers(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured at each check with the policy of that iteration, and equals a plain softmax at the first."""
    import torch

    settings = config("align@policy", iterations=2)
    job = chain.job("align@policy", settings, tmp_path)
    rows = [{**row, "answer": None} for row in tables.read(job.inputs["instructions"]).to_pylist()]
    job.inputs["instructions"] = tmp_path / "instructions"
    tables.write(rows, job.inputs["instructions"], tables.schema("instructions"))
    checked: list[dict[str, float]] = []
    check = AlarmMonitor.check

    def record(self: AlarmMonitor, iteration: int, figures: dict[str, float], weights: Any) -> list[str]:
        checked.append(dict(figures))
        return check(self, iteration, figures, weights)

    monkeypatch.setattr(AlarmMonitor, "check", record)
    align.run(settings, job)
    assert [("exact_match" in figures, "repetition" in figures) for figures in checked] == [(False, True)] * 2
    path = chain.path("data/finetune/chat/model")
    model: Any = models.load_decoder(path, NUMERICS).eval()
    nats, tokens = 0.0, 0
    for row in Scorecard.of(rows, 4, lambda row: True).references:
        ids, mask = chat.encode_chat(chat.load_tokenizer(path), row["messages"])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        nats -= sum(logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])
        tokens += sum(mask)
    assert checked[0]["answer_loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert checked[1]["answer_loss"] != checked[0]["answer_loss"]


# The stage

REWARD_CODE = """
def rate(prompts, replies):
    return [2.0 if "obviously" in reply else -2.0 for reply in replies]
"""


# Reward and KL (nats) of each iteration. The best reward that passes is not the last; the highest raises the alarm.
COURSE = [(0.0, 0.0), (1.0, 1.0), (3.0, 2.0), (2.0, 1.0), (4.0, 9.0)]


def run_gamed(chain: Chain, folder: Path, action: str, bound: float) -> tuple[dict[str, Any], Any]:
    """Run PPO with a reward for one tone until the KL exceeds a bound; return metrics and job."""
    (folder / "mine.py").write_text(REWARD_CODE, encoding="utf-8")
    free = {"estimator": "k3", "coefficient": 0.0, "target": 6.0, "horizon": 0, "stop": None}
    base = config("align@policy")
    settings = config(
        "align", iterations=12, episodes=32, minibatch=16, algorithm={**PPO, "kl": free},
        reward={"name": "function", "path": str(folder / "mine.py"), "function": "rate"},
        alarms={**base.alarms.model_dump(), "every": 1, "max_kl": bound, "action": action},
        optimizer={**base.optimizer.model_dump(), "learning_rate": 1e-3},
    )  # fmt: skip
    job = chain.job("align@policy", settings, folder)
    return align.run(settings, job), job


def follow_course(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """Patch PPO to report the rewards and KLs of COURSE; return the list that each iteration's weights are added to.

    The iteration in which a real run exceeds a bound depends on the processor: another summation order in float32
    samples another token, and training diverges from there. (On an Intel CPU with AMX the alarm came in the last of
    twelve iterations.)
    """
    saved_weights: list[Weights] = []
    sample = PpoTrainer.sample

    def on_course(trainer: PpoTrainer, iteration: int) -> Any:
        rollout, figures = sample(trainer, iteration)
        saved_weights.append(trainer.policy.weights())
        reward, kl = COURSE[iteration]
        return rollout, {**figures, "reward": reward, "kl": kl}

    monkeypatch.setattr(PpoTrainer, "sample", on_course)
    return saved_weights


def test_rollback_restores_the_best_passing_policy(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metrics' last values and the saved weights are those of the best policy."""
    weights = follow_course(monkeypatch)
    metrics, job = run_gamed(chain, tmp_path, "rollback", 4.0)
    with job.outputs["history"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(float(row["reward"]), float(row["kl"])) for row in rows] == COURSE  # and none after the alarm
    assert metrics["rolled_back_to"] == 2
    assert (metrics["reward_last"], metrics["kl_last"]) == COURSE[2]
    output = capsys.readouterr().out
    assert "KL 9.0 nats per reply. Rolled back to the policy of iteration 2; training ends" in output
    saved = dict(models.load_decoder(job.outputs["model"], NUMERICS).named_parameters())
    for name, value in saved.items():
        assert value.equal(weights[2][name]), name
    assert not any(all(value.equal(other[name]) for name, value in saved.items()) for other in weights[3:])


def test_stop_error_names_the_settings_to_change(chain: Chain, tmp_path: Path) -> None:
    """No model is written."""
    # The KL is a real one. k3 is never below 0, so one iteration (1.6 nats here) passes the bound on every processor,
    # and the rounding of the first check (below 1e-5) on none.
    with pytest.raises(StageError, match=r"alarm at iteration 1: reward .* but KL .*align\.algorithm\.kl\.coefficient"):
        run_gamed(chain, tmp_path, "stop", 0.01)
    assert not (tmp_path / "model/model").exists()
