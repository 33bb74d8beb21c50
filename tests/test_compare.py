"""The joined table: intervals over entities, paired differences, and gates that tell the truth."""

from typing import Any

import pytest

from tasks import compare

GATES = compare.Gates(
    masked_names_min=0.9,
    tuned_exact_match_min=0.95,
    heldout_exact_match_min=0.6,
    reward_accuracy_min=0.8,
    ppo_reward_gain_min=0.5,
    ppo_exact_match_drop_max=0.03,
    ppo_distinct_2_kept_min=0.7,
    prune_exact_match_drop_max=0.03,
    int8_exact_match_drop_max=0.02,
    int8_size_ratio_max=0.28,
)


def sheet(tuned: float, heldout: float, reward: float = 1.0, distinct: float = 0.4) -> dict[str, Any]:
    return {"exact_match_tuned": tuned, "exact_match_heldout": heldout, "reward_mean": reward, "distinct_2": distinct}


def sheets(**changed: dict[str, Any]) -> dict[str, Any]:
    good = {
        "encoder": {"masked_names": 0.95},
        "tuned": sheet(0.97, 0.8),
        "policy": sheet(0.96, 0.79, reward=2.0, distinct=0.3),
        "pruned": sheet(0.95, 0.78),
        "int8": sheet(0.95, 0.78),
    }
    return {**good, **changed}


OTHERS = {"reward": {"gap_at_least_1": {"model": 0.81}}, "quantize": {"ratio": 0.27}}


def failed(of: dict[str, Any], others: dict[str, Any] = OTHERS) -> list[str]:
    return [gate["name"] for gate in compare.judge(of, others, GATES) if not gate["passed"]]


def test_every_gate_is_judged_and_good_models_pass() -> None:
    verdicts = compare.judge(sheets(), OTHERS, GATES)
    assert [gate["name"] for gate in verdicts] == list(GATES.model_dump())
    assert all(gate["passed"] for gate in verdicts)


@pytest.mark.parametrize(
    ("changed", "gate"),
    [
        ({"encoder": {"masked_names": 0.89}}, "masked_names_min"),
        ({"encoder": {"masked_names": None}}, "masked_names_min"),
        ({"tuned": sheet(0.94, 0.8)}, "tuned_exact_match_min"),
        ({"policy": sheet(0.96, 0.79, reward=1.4, distinct=0.3)}, "ppo_reward_gain_min"),
        ({"policy": sheet(0.96, 0.79, reward=2.0, distinct=0.2)}, "ppo_distinct_2_kept_min"),
        ({"int8": sheet(0.95, 0.75)}, "int8_exact_match_drop_max"),
    ],
)
def test_a_gate_fails_alone(changed: dict[str, Any], gate: str) -> None:
    assert failed(sheets(**changed)) == [gate]


def test_a_figure_that_could_not_be_had_fails_its_gate() -> None:
    assert failed(sheets(), {**OTHERS, "reward": {"heldout_pairs": 0}}) == ["reward_accuracy_min"]


def test_the_larger_loss_of_the_two_sides_counts() -> None:
    assert compare.drop(sheet(0.9, 0.8), sheet(0.89, 0.7)) == pytest.approx(0.1)
    assert compare.drop(sheet(0.9, 0.8), sheet(0.95, 0.81)) == pytest.approx(-0.01)


def row(entity: str, number: int, correct: bool) -> dict[str, Any]:
    return {"id": f"{entity}-{number}", "entity": entity, "kind": "greedy", "split": "train", "correct": correct}


def test_intervals_resample_entities_not_questions() -> None:
    # Ten entities, each all right or all wrong: 10 independent things, however many questions each has.
    answers = [row(str(entity), n, entity < 5) for entity in range(10) for n in range(40)]
    low, high = compare.interval(compare._correct(answers, "greedy", "train"), 4000, 1)
    assert 0.15 <= low <= 0.25
    assert 0.75 <= high <= 0.85


def test_differences_are_paired_by_question() -> None:
    before = [row(str(entity), n, n == 0) for entity in range(8) for n in range(2)]
    after = [row(str(entity), n, True) for entity in range(8) for n in range(2)]
    found = compare.paired(before, after, ("greedy", "train"), 500, 1)
    assert found == {"change": 0.5, "interval": [0.5, 0.5]}
