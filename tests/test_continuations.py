"""Figures of continuations: shares and means over prompts, and what a step changed prompt by prompt."""

from typing import Any

import pytest

from tasks.compare import continuations


def rows(*scores: list[float], category: str = "insult") -> list[dict[str, Any]]:
    """Return rows of continuations: of each prompt its scores."""
    return [
        {
            "id": f"{category}-{prompt}", "entity": category, "kind": "continuation", "question": f"prompt {prompt}",
            "reply": f"continuation {prompt}-{place}", "toxicity": score,
        }
        for prompt, prompt_scores in enumerate(scores) for place, score in enumerate(prompt_scores)
    ]  # fmt: skip


def test_toxic_share_counts_scores_above_the_threshold() -> None:
    """A score of 0.5 is not toxic; other kinds of rows are ignored; without continuations there are no figures."""
    others = [{**rows([1.0])[0], "kind": "greedy", "toxicity": None}]
    figures = continuations.figures(rows([0.5, 0.51], [0.1, 0.9]) + others, 500, 1)
    assert figures["toxicity_mean"] == pytest.approx(0.5025, abs=1e-4)
    assert figures["toxic_share"] == 0.5
    assert continuations.figures(others, 500, 1) == {}


def test_interval_is_clustered_by_prompt() -> None:
    """Two prompts, one always toxic: the interval is that of two cases, for any number of continuations."""
    figures = continuations.figures(rows([0.9] * 50, [0.1] * 50), 500, 1)
    assert figures["toxic_share_interval"] == [0.0945, 0.9055]
    assert figures["toxicity_mean_interval"] == pytest.approx([0.1, 0.9])


def test_interval_of_toxic_share_0_has_width() -> None:
    """The share's Wilson interval extends above 0; the mean has a bootstrap interval."""
    figures = continuations.figures(rows(*[[0.1] * 3] * 20), 500, 1)
    assert figures["toxic_share_interval"] == [0.0, 0.1611]
    assert figures["toxicity_mean_interval"] == pytest.approx([0.1, 0.1])


def test_changes_are_paired_by_prompt() -> None:
    """Equal scores on each prompt are no change; prompts that one model lacks are ignored."""
    before = rows(*([0.9 * (n % 2)] for n in range(40)))
    assert continuations.changes(before, before, 500, 1) == {
        "toxicity_mean": {"change": 0.0, "interval": [0.0, 0.0]},
        "toxic_share": {"change": 0.0, "interval": [0.0, 0.0]},
    }
    after = [{**row, "toxicity": row["toxicity"] / 2} for row in before] + rows([1.0], category="threat")
    changes = continuations.changes(before, after, 2000, 1)
    assert changes["toxic_share"]["change"] == -0.5
    assert changes["toxic_share"]["interval"] == pytest.approx([-0.5 - 0.155, -0.5 + 0.155], abs=0.03)
    assert changes["toxicity_mean"]["change"] == pytest.approx(-0.225)
    assert continuations.changes(before, [], 500, 1) == {}


def test_a_table_has_all_prompts_first_and_then_each_category() -> None:
    """Each model's figures, and the change from the fine-tuned to the aligned model."""
    tuned = rows([0.9], [0.9]) + rows([0.1], category="threat")
    policy = rows([0.9], [0.1]) + rows([0.1], category="threat")
    table = continuations.by_category({"tuned": tuned, "policy": policy, "int8": []}, {"policy": "tuned"}, 200, 1)
    assert [(item["category"], item["prompts"]) for item in table] == [(None, 3), ("insult", 2), ("threat", 1)]
    assert [item["models"]["policy"]["toxic_share"] for item in table] == [0.3333, 0.5, 0.0]
    assert [item["changes"]["policy"]["toxic_share"]["change"] for item in table] == [-0.3333, -0.5, 0.0]
    assert all(list(item["models"]) == ["tuned", "policy"] for item in table)
    assert continuations.by_category({"tuned": []}, {}, 200, 1) == []


def test_most_toxic_prompts_of_each_category() -> None:
    """The prompts with the highest score of any model, with each model's worst continuation."""
    answers = {"tuned": rows([0.2, 0.3], [0.1, 0.1], [0.6, 0.0]), "policy": rows([0.9, 0.1], [0.0, 0.2], [0.1, 0.4])}
    worst = continuations.most_toxic(answers, 2)
    assert [item["prompt"] for item in worst] == ["prompt 0", "prompt 2"]
    assert {model: row["reply"] for model, row in worst[0]["models"].items()} == {
        "tuned": "continuation 0-1", "policy": "continuation 0-0",
    }  # fmt: skip
