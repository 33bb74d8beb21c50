"""The table and its gates: intervals on known cases, verdicts at their limits, and a run that always ends well."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import compare, evaluate
from tasks.common.settings import Checkpoints
from tasks.common.stage import Job
from tasks.compare import Gates, drop, interval, judge, paired, win_rate
from tests.training_fixtures import NUMERICS

GATES: dict[str, float] = {
    "masked_names_min": 0.9,
    "tuned_exact_match_min": 0.95,
    "heldout_exact_match_min": 0.6,
    "reward_accuracy_min": 0.8,
    "ppo_reward_gain_min": 0.5,
    "ppo_exact_match_drop_max": 0.03,
    "ppo_distinct_2_kept_min": 0.7,
    "prune_removed_min": 0.25,
    "prune_exact_match_drop_max": 0.03,
    "int8_exact_match_drop_max": 0.02,
    "int8_size_ratio_max": 0.28,
}
SHEETS: dict[str, dict[str, Any]] = {
    "encoder": {"masked_names": 0.95},
    "encoder-int8": {"masked_names": 0.94},
    "base": {"exact_match_tuned": 0.0, "exact_match_heldout": 0.0, "reward_mean": -0.2, "distinct_2": 0.5},
    "tuned": {"exact_match_tuned": 0.98, "exact_match_heldout": 0.7, "reward_mean": 0.1, "distinct_2": 0.4},
    "policy": {"exact_match_tuned": 0.97, "exact_match_heldout": 0.68, "reward_mean": 1.2, "distinct_2": 0.3},
    "pruned": {"exact_match_tuned": 0.96, "exact_match_heldout": 0.66, "reward_mean": 1.1, "distinct_2": 0.3},
    "int8": {"exact_match_tuned": 0.96, "exact_match_heldout": 0.65, "reward_mean": 1.1, "distinct_2": 0.3},
}
OTHERS: dict[str, dict[str, Any]] = {
    "reward": {"gap_at_least_1": {"model": 0.82}},
    "prune": {"removed": 0.26},
    "quantize": {"ratio": 0.26},
}

Answers = dict[str, list[tuple[str, bool]]]


def answers(*by_entity: list[bool]) -> Answers:
    """Return answers, right or wrong, entity by entity."""
    return {f"e{e}": [(f"q{e}-{q}", right) for q, right in enumerate(row)] for e, row in enumerate(by_entity)}


def verdicts(sheets: dict[str, Any] = SHEETS, others: dict[str, Any] = OTHERS, **gates: float) -> dict[str, Any]:
    """Return the verdicts by name."""
    return {gate["name"]: gate for gate in judge(sheets, others, Gates(**{**GATES, **gates}))}


def changed(model: str, **figures: Any) -> dict[str, Any]:
    """Return the sheets with some figures of one model changed."""
    return {**SHEETS, model: {**SHEETS[model], **figures}}


# Intervals


def test_what_is_always_so_is_not_certain() -> None:
    """All right, or all wrong: what twenty entities tell, not what their sixty questions would."""
    assert interval(answers(*[[True] * 3] * 20)) == [0.8389, 1.0]
    assert interval(answers(*[[False] * 3] * 20)) == [0.0, 0.1611]


def test_a_rate_has_the_width_that_is_known() -> None:
    """A hundred entities of one question, thirty right: the binomial's 95 % interval, 0.30 +- 1.96 x 0.0458."""
    low, high = interval(answers(*[[number < 30] for number in range(100)]))
    assert [low, high] == pytest.approx([0.30 - 0.0898, 0.30 + 0.0898], abs=0.02)


def test_entities_are_drawn_not_questions() -> None:
    """Questions about one entity are right or wrong together: two entities of fifty are two cases, not a hundred."""
    assert interval(answers([True] * 50, [False] * 50)) == interval(answers([True], [False])) == [0.0945, 0.9055]


def test_entities_weigh_by_their_questions() -> None:
    """The rate is over questions: an entity with nine of them weighs nine times as much as one with a single one."""
    found = interval(answers(*[[True] * 9, [False]] * 200))
    assert found[0] < 0.9 < found[1]
    assert found == pytest.approx([0.9, 0.9], abs=0.03)


def test_an_interval_is_the_same_every_time() -> None:
    """Whatever the order of the rows."""
    case = answers(*[[bool(n % 3), bool(n % 2)] for n in range(30)])
    shuffled = dict(reversed(case.items()))
    assert interval(case) == interval(shuffled)


def rows(right: list[bool], kind: str = "greedy", split: str = "train") -> list[dict[str, Any]]:
    """Return rows of a sheet, one entity each."""
    return [
        {"id": f"q{n}", "entity": f"e{n}", "kind": kind, "split": split, "correct": value}
        for n, value in enumerate(right)
    ]


def test_differences_are_paired() -> None:
    """Two models with the same mistakes differ by nothing, exactly, however uncertain their rates are."""
    right = [n % 2 == 0 for n in range(40)]
    assert paired(rows(right), rows(right), ("greedy", "train"), 500, 1) == {"change": 0.0, "interval": [0.0, 0.0]}
    worse = [value and n != 0 for n, value in enumerate(right)]
    found = paired(rows(right), rows(worse), ("greedy", "train"), 2000, 1)
    assert found["change"] == -0.025
    assert found["interval"][0] <= -0.05
    assert found["interval"][1] == 0.0


def test_differences_compare_the_same_questions() -> None:
    """Other kinds, the other side of the sheet, and what only one model was asked do not count."""
    before = rows([True, False, True]) + rows([True] * 9, split="heldout") + rows([True] * 9, kind="sampled")
    after = rows([True, True])
    assert paired(before, after, ("greedy", "train"), 500, 1)["change"] == 0.5


# The judge


def judged(scores: list[float], entities: int = 10**6, **changes: Any) -> list[dict[str, Any]]:
    """Return sampled replies to held-out prompts with the judge's scores, asked about so many entities in turn."""
    row = {"kind": "sampled", "split": "heldout", "question": "?", "reply": "!", "given": None, "wanted": "!"}
    return [
        {**row, "id": f"q{n}", "entity": f"e{n % entities}", "correct": None, "reward": 0.0, "judged": score, **changes}
        for n, score in enumerate(scores)
    ]


def test_a_win_rate_counts_ties_half() -> None:
    """Prompt by prompt: three wins, two ties and a loss of six."""
    found = win_rate(judged([0.0] * 6), judged([1.0, 2.0, 0.1, 0.0, 0.0, -1.0]))
    assert found["win_rate_over_tuned"] == round(4 / 6, 4)
    low, high = found["win_rate_over_tuned_interval"]
    assert 0 <= low < 4 / 6 < high <= 1


def test_a_win_rate_has_the_width_that_is_known() -> None:
    """A hundred prompts of an entity each, seventy won: 0.70 +- 1.96 x 0.0458; replies about one go together."""
    new = [1.0 if n < 70 else -1.0 for n in range(100)]
    found = win_rate(judged([0.0] * 100), judged(new))["win_rate_over_tuned_interval"]
    assert found == pytest.approx([0.70 - 0.0898, 0.70 + 0.0898], abs=0.02)
    two = [1.0 if n % 2 else -1.0 for n in range(100)]
    together = win_rate(judged([0.0] * 100, 2), judged(two, 2))
    assert together == {"win_rate_over_tuned": 0.5, "win_rate_over_tuned_interval": [0.0945, 0.9055]}


def test_winning_always_is_not_certain() -> None:
    """Twenty wins of twenty leave room for one loss in six; ties throughout tell no more than as many entities."""
    always = win_rate(judged([0.0] * 20), judged([1.0] * 20))
    assert always == {"win_rate_over_tuned": 1.0, "win_rate_over_tuned_interval": [0.8389, 1.0]}
    ties = win_rate(judged([0.0] * 20), judged([0.0] * 20))
    assert ties == {"win_rate_over_tuned": 0.5, "win_rate_over_tuned_interval": [0.2993, 0.7007]}


def test_only_replies_to_held_out_prompts_are_compared() -> None:
    """Not those to questions that PPO practised, nor greedy ones; without any there is no rate."""
    others = judged([9.0] * 5, split="train") + judged([9.0] * 5, kind="greedy")
    before, after = judged([0.0, 0.0]), judged([-1.0, 1.0])
    assert win_rate(before + others, after + others)["win_rate_over_tuned"] == 0.5
    assert win_rate(others, others) == {"win_rate_over_tuned": None, "win_rate_over_tuned_interval": None}


# Gates


def test_a_good_chain_passes_every_gate() -> None:
    """Each gate once, with its value and limit."""
    found = verdicts()
    assert list(found) == list(GATES)
    assert all(gate["passed"] is True for gate in found.values())
    assert {name: gate["limit"] for name, gate in found.items()} == GATES
    values = {name: gate["value"] for name, gate in found.items()}
    assert values == {
        "masked_names_min": 0.95,
        "tuned_exact_match_min": 0.98,
        "heldout_exact_match_min": 0.7,
        "reward_accuracy_min": 0.82,
        "ppo_reward_gain_min": 1.1,
        "ppo_exact_match_drop_max": 0.02,
        "ppo_distinct_2_kept_min": 0.75,
        "prune_removed_min": 0.26,
        "prune_exact_match_drop_max": 0.02,
        "int8_exact_match_drop_max": 0.01,
        "int8_size_ratio_max": 0.26,
    }


@pytest.mark.parametrize(
    ("name", "sheets", "others"),
    [
        ("masked_names_min", changed("encoder", masked_names=0.89), {}),
        ("tuned_exact_match_min", changed("tuned", exact_match_tuned=0.9499), {}),
        ("heldout_exact_match_min", changed("tuned", exact_match_heldout=0.5), {}),
        ("reward_accuracy_min", SHEETS, {"reward": {"gap_at_least_1": {"model": 0.79}}}),
        ("ppo_reward_gain_min", changed("policy", reward_mean=0.59), {}),
        ("ppo_exact_match_drop_max", changed("policy", exact_match_tuned=0.94), {}),
        ("ppo_exact_match_drop_max", changed("policy", exact_match_heldout=0.66), {}),
        ("ppo_distinct_2_kept_min", changed("policy", distinct_2=0.27), {}),
        ("prune_removed_min", SHEETS, {"prune": {"removed": 0.249}}),
        ("prune_exact_match_drop_max", changed("pruned", exact_match_heldout=0.64), {}),
        ("int8_exact_match_drop_max", changed("int8", exact_match_tuned=0.93), {}),
        ("int8_size_ratio_max", SHEETS, {"quantize": {"ratio": 0.281}}),
    ],
)
def test_each_gate_fails_by_its_own_figure(name: str, sheets: Any, others: dict[str, Any]) -> None:
    """A figure just beyond its limit fails its gate; either side of the sheet counts."""
    assert verdicts(sheets, {**OTHERS, **others})[name]["passed"] is False


@pytest.mark.parametrize(
    ("name", "sheets"),
    [
        ("masked_names_min", changed("encoder", masked_names=None)),
        ("tuned_exact_match_min", changed("tuned", exact_match_tuned=None)),
        ("heldout_exact_match_min", changed("tuned", exact_match_heldout=None)),
        ("ppo_exact_match_drop_max", changed("policy", exact_match_tuned=None, exact_match_heldout=None)),
        ("ppo_distinct_2_kept_min", changed("tuned", distinct_2=0.0)),
    ],
)
def test_a_figure_that_could_not_be_had_fails(name: str, sheets: Any) -> None:
    """`None` passes no gate, not even one with a limit of 0."""
    lenient: dict[str, Any] = {name: 0.0 if name.endswith("_min") else 1.0}
    found = verdicts(sheets, **lenient)[name]
    assert found["value"] is None
    assert found["passed"] is False


@pytest.mark.parametrize(
    ("figures", "value"),
    [
        ({"gap_at_least_1": {"model": 0.9}, "ranked_only": {"model": 0.7}}, 0.9),
        ({"gap_at_least_1": {"pairs": 0, "model": None}, "gap_at_least_0.5": {"model": 0.8}}, 0.8),
        ({"gap_at_least_1": {"pairs": 0, "model": None}, "ranked_only": {"model": 0.7}}, 0.7),
    ],
)
def test_the_reward_model_is_held_to_the_pairs_that_there_are(figures: dict[str, Any], value: float) -> None:
    """People who only ranked, or rated from 0 to 1, make no pairs a point apart."""
    assert verdicts(others={**OTHERS, "reward": figures})["reward_accuracy_min"]["value"] == value


def test_a_reward_model_without_pairs_fails() -> None:
    """No held-out pairs is no accuracy."""
    assert verdicts(others={**OTHERS, "reward": {"heldout_pairs": 0}})["reward_accuracy_min"]["passed"] is False


def test_a_limit_that_is_met_is_passed() -> None:
    """Exactly 3 points, exactly half a rating point: floating point does not decide (0.97 - 0.94 > 0.03)."""
    sheets = changed("tuned", exact_match_tuned=0.97, exact_match_heldout=0.68, reward_mean=0.9)
    sheets["policy"] = {**SHEETS["policy"], "exact_match_tuned": 0.94, "reward_mean": 1.4}
    found = verdicts(sheets)
    assert 0.97 - 0.94 > 0.03
    assert 1.4 - 0.9 < 0.5
    assert found["ppo_exact_match_drop_max"] == {
        "name": "ppo_exact_match_drop_max",
        "value": 0.03,
        "limit": 0.03,
        "passed": True,
    }
    assert found["ppo_reward_gain_min"]["passed"] is True


def test_a_drop_is_the_larger_of_both_sides() -> None:
    """A gain on one side does not make up for a loss on the other."""
    assert drop(SHEETS["tuned"], SHEETS["policy"]) == pytest.approx(0.02)
    gained = {"exact_match_tuned": 1.0, "exact_match_heldout": 0.4}
    assert drop(SHEETS["tuned"], gained) == pytest.approx(0.3)
    assert drop(SHEETS["tuned"], {"exact_match_tuned": 1.0, "exact_match_heldout": 0.9}) == pytest.approx(-0.02)
    assert drop(SHEETS["tuned"], {"exact_match_tuned": None, "exact_match_heldout": 0.6}) == pytest.approx(0.1)


# The stage


def continued(score: float) -> list[dict[str, Any]]:
    """Return continuations of thirty prompts, every third of which draws one with this score."""
    return [
        {
            "id": f"p{n}", "entity": ("insult", "threat")[n % 2], "split": "heldout", "kind": "continued",
            "question": f"Prompt {n}", "reply": f"continuation {n}", "toxicity": 0.1 if n % 3 else score,
        }
        for n in range(30)
    ]  # fmt: skip


def make_job(
    folder: Path, sheets: dict[str, dict[str, Any]], more: dict[str, list[dict[str, Any]]] | None = None
) -> Job:
    """Write sheets and answers to a folder and return the job that compares them."""
    inputs = {}
    for name, path in compare.INPUTS.items():
        inputs[name] = folder / path
        inputs[name].parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for key, figures in sheets.items():
        kind = "masked" if "encoder" in key else "greedy"
        rate = figures.get("masked_names") or figures.get("exact_match_tuned") or 0.0
        found = [
            {**row, "question": "?", "reply": "!", "given": None, "wanted": "!", "reward": None, "judged": None}
            for split in ("train", "heldout")
            for row in rows((random.random(50) < rate).tolist(), kind, split)
        ]
        if kind == "greedy":
            found += [
                {**row, "reward": 0.0, "judged": 1.0 if key == "policy" else 0.0}
                for row in judged([0.0] * 4, split="heldout")
            ]
        found += (more or {}).get(key, [])
        evaluate._write_answers(found, inputs[f"answers of {key}"])
        inputs[f"sheet of {key}"].write_text(json.dumps({"model": key, **figures}))
    for name, figures in OTHERS.items():
        inputs[name].write_text(json.dumps(figures))
    outputs = {name: folder / Path(path).name for name, path in compare.OUTPUTS.items()}
    return Job("compare", None, inputs, outputs, 1, NUMERICS, "r", Checkpoints(url="memory://", every_seconds=1e9))


def test_the_table_shows_every_model_and_every_step(tmp_path: Path) -> None:
    """Models in chain order with an interval beside each rate, `None` where a figure does not apply; paired steps."""
    job = make_job(tmp_path, SHEETS)
    found = compare.run(compare.Config(resamples=200, gates=Gates(**GATES)), job)
    assert [row["model"] for row in found["models"]] == list(compare.CHAIN)
    assert {tuple(row) for row in found["models"]} == {compare.COLUMNS}
    for row in found["models"]:
        for rate in compare.RATES:
            between = row[f"{rate}_interval"]
            assert (between is None) == (row[rate] is None)
            assert between is None or 0 <= between[0] <= between[1] <= 1
    steps = json.loads(job.outputs["differences"].read_text())
    assert [(step["from"], step["to"]) for step in steps if step["rate"] == "exact_match_tuned"] == [
        ("base", "tuned"),
        ("tuned", "policy"),
        ("policy", "pruned"),
        ("pruned", "int8"),
    ]
    assert [(step["from"], step["to"]) for step in steps if step["rate"] == "masked_names"] == [
        ("encoder", "encoder-int8")
    ]
    assert all(step["interval"][0] <= step["change"] <= step["interval"][1] for step in steps)
    won = {row["model"]: row["win_rate_over_tuned"] for row in found["models"]}
    assert won == {**dict.fromkeys(compare.CHAIN), "policy": 1.0, "pruned": 0.5, "int8": 0.5}
    assert found["toxicity"] is None
    json.dumps(found, allow_nan=False)
    page = job.outputs["samples"].read_text(encoding="utf-8")
    assert [name for name in compare.CHAIN if f"<b>{name}</b>" in page] == list(compare.DECODERS)
    assert page.count("preferred to tuned") == 4


def test_a_failed_gate_does_not_stop_the_comparison(tmp_path: Path) -> None:
    """The figures of a chain that fails are there to be read; `package` is what refuses."""
    job = make_job(tmp_path, changed("tuned", exact_match_tuned=0.1))
    found = compare.run(compare.Config(resamples=100, gates=Gates(**GATES)), job)
    assert [gate["name"] for gate in found["gates"] if not gate["passed"]] == ["tuned_exact_match_min"]


def test_toxicity_is_compared_before_and_after_alignment(tmp_path: Path) -> None:
    """By model and category with intervals, the policy against the tuned model, and shown on the page of samples."""
    made = {
        "file": "labelled.csv", "sha256": "ab" * 32, "trained_on": 80, "heldout": 20, "accuracy": 0.9, "auc": 0.95,
        "accuracy_of_the_usual_class": 0.6, "references_toxic": 0.0,
    }  # fmt: skip
    told = {"classifier": made, "ask": "text", "prompts": 30, "continuations": 30, "mean": 0.3, "toxic": 0.3}
    scores = {"base": 0.9, "tuned": 0.9, "policy": 0.2, "pruned": 0.2, "int8": 0.2}
    sheets = {key: figures | ({"toxicity": told} if key in scores else {}) for key, figures in SHEETS.items()}
    job = make_job(tmp_path, sheets, {key: continued(score) for key, score in scores.items()})
    found = compare.run(compare.Config(resamples=500, gates=Gates(**GATES)), job)
    rows = {row["model"]: row for row in found["models"]}
    assert {key: row["toxic_share"] for key, row in rows.items()} == {
        **dict.fromkeys(compare.CHAIN), "base": 0.3333, "tuned": 0.3333, "policy": 0.0, "pruned": 0.0, "int8": 0.0,
    }  # fmt: skip
    low, high = rows["tuned"]["toxic_share_interval"]
    assert low < 0.3333 < high
    table = found["toxicity"]
    assert table["classifier"] == made
    assert [item["category"] for item in table["categories"]] == [None, "insult", "threat"]
    change = table["categories"][0]["policy_over_tuned"]["toxic_share"]
    assert change["change"] == -0.3333
    assert change["interval"][1] < 0
    steps = [step for step in json.loads(job.outputs["differences"].read_text()) if step["rate"] == "toxic_share"]
    assert {(step["from"], step["to"]): step["change"] for step in steps} == {
        ("base", "tuned"): 0.0, ("tuned", "policy"): -0.3333, ("policy", "pruned"): 0.0, ("pruned", "int8"): 0.0,
    }  # fmt: skip
    page = job.outputs["samples"].read_text(encoding="utf-8")
    assert "trained on 80" in page
    assert "90.0 % of 20" in " ".join(page.split())
    assert page.count("continuation ") >= 5 * 2 * 5  # of the two categories five prompts by five models
