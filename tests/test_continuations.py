"""Figures of continuations: shares and means over prompts, and what a step changed prompt by prompt."""

from typing import Any

import pytest

from tasks.common.evaluation import continuations


def rows(*scores: list[float], category: str = "insult") -> list[dict[str, Any]]:
    """Return rows of continuations: of each prompt its scores."""
    return [
        {
            "id": f"{category}-{prompt}", "entity": category, "kind": "continued", "question": f"prompt {prompt}",
            "reply": f"continuation {prompt}-{place}", "toxicity": score,
        }
        for prompt, found in enumerate(scores) for place, score in enumerate(found)
    ]  # fmt: skip


def test_shares_count_what_is_more_likely_toxic_than_not() -> None:
    """Exactly 0.5 is not; other rows of the sheet do not count; without any there are no figures."""
    others = [{**rows([1.0])[0], "kind": "greedy", "toxicity": None}]
    found = continuations.figures(rows([0.5, 0.51], [0.1, 0.9]) + others, 500, 1)
    assert found["toxicity_mean"] == pytest.approx(0.5025, abs=1e-4)
    assert found["toxic_share"] == 0.5
    assert continuations.figures(others, 500, 1) == {}


def test_prompts_are_drawn_not_continuations() -> None:
    """Two prompts, one always toxic: they tell what two cases do, however many continuations each has."""
    found = continuations.figures(rows([0.9] * 50, [0.1] * 50), 500, 1)
    assert found["toxic_share_interval"] == [0.0945, 0.9055]
    assert found["toxicity_mean_interval"] == pytest.approx([0.1, 0.9])


def test_no_toxic_continuation_is_not_certainty() -> None:
    """The share's interval leaves room above 0; the mean is no share and has that of its resamples."""
    found = continuations.figures(rows(*[[0.1] * 3] * 20), 500, 1)
    assert found["toxic_share_interval"] == [0.0, 0.1611]
    assert found["toxicity_mean_interval"] == pytest.approx([0.1, 0.1])


def test_changes_are_paired_by_prompt() -> None:
    """The same on prompts that differ widely is no change at all; of prompts that one lacks nothing is said."""
    before = rows(*([0.9 * (n % 2)] for n in range(40)))
    assert continuations.changes(before, before, 500, 1) == {
        "toxicity_mean": {"change": 0.0, "interval": [0.0, 0.0]},
        "toxic_share": {"change": 0.0, "interval": [0.0, 0.0]},
    }
    after = [{**row, "toxicity": row["toxicity"] / 2} for row in before] + rows([1.0], category="threat")
    found = continuations.changes(before, after, 2000, 1)
    assert found["toxic_share"]["change"] == -0.5
    assert found["toxic_share"]["interval"] == pytest.approx([-0.5 - 0.155, -0.5 + 0.155], abs=0.03)
    assert found["toxicity_mean"]["change"] == pytest.approx(-0.225)
    assert continuations.changes(before, [], 500, 1) == {}


def test_a_table_has_all_prompts_first_and_then_each_category() -> None:
    """Each model's figures, and what lies between the tuned model and the policy."""
    tuned = rows([0.9], [0.9]) + rows([0.1], category="threat")
    policy = rows([0.9], [0.1]) + rows([0.1], category="threat")
    table = continuations.by_category({"tuned": tuned, "policy": policy, "int8": []}, 200, 1)
    assert [(item["category"], item["prompts"]) for item in table] == [(None, 3), ("insult", 2), ("threat", 1)]
    assert [item["models"]["policy"]["toxic_share"] for item in table] == [0.3333, 0.5, 0.0]
    assert [item["policy_over_tuned"]["toxic_share"]["change"] for item in table] == [-0.3333, -0.5, 0.0]
    assert all(list(item["models"]) == ["tuned", "policy"] for item in table)
    assert continuations.by_category({"tuned": []}, 200, 1) == []


def test_the_worst_of_each_category_are_found() -> None:
    """The prompts with the highest score of any model, and of each model its own worst."""
    answers = {"tuned": rows([0.2, 0.3], [0.1, 0.1], [0.6, 0.0]), "policy": rows([0.9, 0.1], [0.0, 0.2], [0.1, 0.4])}
    found = continuations.most_toxic(answers, 2)
    assert [item["prompt"] for item in found] == ["prompt 0", "prompt 2"]
    assert {model: row["reply"] for model, row in found[0]["models"].items()} == {
        "tuned": "continuation 0-1", "policy": "continuation 0-0",
    }  # fmt: skip
