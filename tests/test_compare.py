"""The scorecard and its gates: intervals on known cases, gates at their limits, and success despite failed gates."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tasks.common.harness.job import Job, Link
from tasks.common.harness.lineage import evaluated_ancestor, evaluations, model_before_alignment
from tasks.common.harness.records import write_json
from tasks.common.settings import Checkpoints
from tasks.compare import gates, means, preferences
from tasks.compare import stage as compare
from tasks.compare.gates import Gate
from tasks.evaluate import stage as evaluate
from tests import training_fixtures
from tests.training_fixtures import NUMERICS

FIGURES: dict[str, dict[str, Any]] = {
    "base": {"exact_match_seen": 0.0, "exact_match_heldout": 0.0, "reward_mean": -0.2, "distinct_2": 0.5},
    "encoder": {"masked_names": 0.95},
    "tuned": {"exact_match_seen": 0.98, "exact_match_heldout": 0.7, "reward_mean": 0.1, "distinct_2": 0.4},
    "policy": {"exact_match_seen": 0.97, "exact_match_heldout": 0.68, "reward_mean": 1.2, "distinct_2": 0.3},
    "pruned": {"exact_match_seen": 0.96, "exact_match_heldout": 0.66, "reward_mean": 1.1, "distinct_2": 0.3},
    "int8": {"exact_match_seen": 0.96, "exact_match_heldout": 0.65, "reward_mean": 1.1, "distinct_2": 0.3},
    "encoder-int8": {"masked_names": 0.94},
}
OTHERS: dict[str, dict[str, Any]] = {"reward@train": {"accuracy": 0.82, "gap_at_least_1": {"model": 0.83}, "cut": True}}
GATES = [
    {"metric": "exact_match_seen", "model": "tuned", "min": 0.95},
    {"metric": "accuracy", "model": "reward@train", "min": 0.8},
]
DECODERS = [name for name in FIGURES if "encoder" not in name]

Answers = list[dict[str, Any]]


def spec(kind: str = "greedy", split: str | None = "train", **changes: Any) -> dict[str, Any]:
    """Return how a figure follows from rows: the rate of correct ones, unless changed."""
    return {"rows": kind, "column": "correct", "split": split, "by": None, "rate": True, "scale": 1.0, **changes}


SPECS = {
    "exact_match": {"exact_match_seen": spec(), "exact_match_heldout": spec(split="heldout")},
    "masked_names": {"masked_names": spec("masked")},
}


def described(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the evaluations of a model with these figures, as the stage `evaluate` records them."""
    found = {
        name: {"kind": name, "applies_to": "Models.", "means": specs}
        for name, specs in SPECS.items()
        if specs.keys() & figures.keys()
    }
    judge = {"judge": {"kind": "judge", "applies_to": "Models.", "means": {}}} if "reward_mean" in figures else {}
    return {**found, **judge, "reward": {"kind": "reward", "applies_to": "Models.", "means": {}}}


def answers(*by_entity: list[bool]) -> Answers:
    """Return answer rows, right or wrong, entity by entity."""
    return [
        {"id": f"q{e}-{q}", "entity": f"e{e}", "kind": "greedy", "split": "train", "correct": right}
        for e, row in enumerate(by_entity)
        for q, right in enumerate(row)
    ]


def interval(rows: Answers) -> list[float]:
    """Return the interval of the rate of correct rows."""
    found = means.interval(rows, spec(), 500, 1)
    assert found is not None
    return found


def check_gate(figures_by_model: dict[str, Any] = FIGURES, **gate: Any) -> dict[str, Any]:
    """Return a gate with its value and verdict."""
    evaluated = {name: described(figures) for name, figures in figures_by_model.items()}
    return gates.check(Gate.model_validate(gate), figures_by_model | OTHERS, evaluated)


def figures_with(model: str, **figures: Any) -> dict[str, Any]:
    """Return FIGURES with some figures of one model changed."""
    return {**FIGURES, model: {**FIGURES[model], **figures}}


# Intervals


def test_interval_of_rate_0_or_1_has_width() -> None:
    """All right, or all wrong: the interval of twenty cases (entities), not of sixty (questions)."""
    assert interval(answers(*[[True] * 3] * 20)) == [0.8389, 1.0]
    assert interval(answers(*[[False] * 3] * 20)) == [0.0, 0.1611]


def test_rate_interval_matches_binomial() -> None:
    """A hundred entities of one question, thirty right: the binomial's 95 % interval, 0.30 +- 1.96 x 0.0458."""
    low, high = interval(answers(*[[number < 30] for number in range(100)]))
    assert [low, high] == pytest.approx([0.30 - 0.0898, 0.30 + 0.0898], abs=0.02)


def test_interval_is_clustered_by_entity() -> None:
    """Answers about one entity are correlated: two entities of fifty questions are two cases, not a hundred."""
    assert interval(answers([True] * 50, [False] * 50)) == interval(answers([True], [False])) == [0.0945, 0.9055]


def test_entities_weigh_by_their_questions() -> None:
    """The rate is over questions: an entity with nine has nine times the weight of an entity with one."""
    bounds = interval(answers(*[[True] * 9, [False]] * 200))
    assert bounds[0] < 0.9 < bounds[1]
    assert bounds == pytest.approx([0.9, 0.9], abs=0.03)


def test_interval_is_independent_of_row_order() -> None:
    """The order of the rows does not matter."""
    case = answers(*[[bool(n % 3), bool(n % 2)] for n in range(30)])
    assert interval(case) == interval(case[::-1])


def rows(right: list[bool], kind: str = "greedy", split: str = "train") -> list[dict[str, Any]]:
    """Return answer rows about one entity each."""
    evaluation = "masked_names" if kind == "masked" else "exact_match"
    return [
        {"id": f"q{n}", "entity": f"e{n}", "kind": kind, "split": split, "correct": value, "evaluation": evaluation}
        for n, value in enumerate(right)
    ]


def paired_difference(before: Answers, after: Answers, resamples: int, **changes: Any) -> dict[str, Any]:
    """Return the paired difference of the rate of correct rows, or of another figure."""
    wanted = spec(**changes)
    chosen = [means.select(rows, wanted, "exact_match") for rows in (before, after)]
    return means.paired_difference(chosen[0], chosen[1], wanted, resamples, 1)


def test_differences_are_paired() -> None:
    """Two models with the same mistakes have difference 0 with interval [0, 0]."""
    right = [n % 2 == 0 for n in range(40)]
    assert paired_difference(rows(right), rows(right), 500) == {
        "change": 0.0,
        "interval": [0.0, 0.0],
    }
    worse = [value and n != 0 for n, value in enumerate(right)]
    difference = paired_difference(rows(right), rows(worse), 2000)
    assert difference["change"] == -0.025
    assert difference["interval"][0] <= -0.05
    assert difference["interval"][1] == 0.0


def test_differences_compare_the_same_questions() -> None:
    """Rows of other kinds or splits and questions to only one model do not count."""
    before = rows([True, False, True]) + rows([True] * 9, split="heldout") + rows([True] * 9, kind="sampled")
    after = rows([True, True])
    assert paired_difference(before, after, 500)["change"] == 0.5


def test_difference_of_ratios_is_over_the_items_of_both() -> None:
    """Nats per token of two models with different tokenizers: each is divided by its own number of tokens."""
    before = [{**row, "nats": 2.0 * n, "tokens": n + 1} for n, row in enumerate(rows([True] * 3))]
    after = [{**row, "nats": 1.0 * n, "tokens": 2} for n, row in enumerate(rows([True] * 3))]
    ratio = paired_difference(before, after, 300, column="nats", by="tokens", rate=False, scale=10.0)
    assert ratio["change"] == pytest.approx(10 * (3 / 6 - 6 / 6))
    assert ratio["interval"][0] <= ratio["change"] <= ratio["interval"][1]


def test_figures_are_given_apart_by_seen_text() -> None:
    groups = ["seen", "seen", "nearly", "unseen", "unseen", None]
    table = [{**row, "seen_text": group} for row, group in zip(rows([True] * 3 + [False] * 3), groups, strict=True)]
    assert means.by_seen_text(table, spec()) == {
        "seen": {"value": 1.0, "items": 2}, "nearly": {"value": 1.0, "items": 1}, "unseen": {"value": 0.0, "items": 2},
    }  # fmt: skip
    assert means.by_seen_text([{**row, "seen_text": None} for row in table], spec()) == {}


# The judge


def win_rate(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the win rate of scored replies."""
    pairs = preferences.pair_replies(before, after)
    return preferences.win_rate(pairs, preferences.by_score(pairs))


def judged_rows(scores: list[float], entities: int = 10**6, **changes: Any) -> list[dict[str, Any]]:
    """Return sampled replies to held-out prompts with these judge scores, cycling through `entities` entities."""
    row = {"kind": "sampled", "split": "heldout", "question": "?", "reply": "!", "extracted": None, "reference": "!"}
    return [
        {
            **row,
            "id": f"q{n}",
            "entity": f"e{n % entities}",
            "correct": None,
            "reward": 0.0,
            "judge_score": score,
            **changes,
        }
        for n, score in enumerate(scores)
    ]


def test_a_win_rate_counts_ties_half() -> None:
    """Six prompts: three wins, two ties and one loss."""
    figures = win_rate(judged_rows([0.0] * 6), judged_rows([1.0, 2.0, 0.1, 0.0, 0.0, -1.0]))
    assert figures["win_rate"] == round(4 / 6, 4)
    low, high = figures["win_rate_interval"]
    assert 0 <= low < 4 / 6 < high <= 1


def test_win_rate_interval_matches_binomial() -> None:
    """A hundred prompts of an entity each, seventy won: 0.70 +- 1.96 x 0.0458; clustered by entity."""
    new = [1.0 if n < 70 else -1.0 for n in range(100)]
    bounds = win_rate(judged_rows([0.0] * 100), judged_rows(new))["win_rate_interval"]
    assert bounds == pytest.approx([0.70 - 0.0898, 0.70 + 0.0898], abs=0.02)
    two = [1.0 if n % 2 else -1.0 for n in range(100)]
    together = win_rate(judged_rows([0.0] * 100, 2), judged_rows(two, 2))
    assert together == {"win_rate": 0.5, "win_rate_interval": [0.0945, 0.9055]}


def test_interval_of_win_rate_1_has_width() -> None:
    """Twenty wins of twenty have a lower bound of about 5 / 6; with only ties the width follows from the entities."""
    always = win_rate(judged_rows([0.0] * 20), judged_rows([1.0] * 20))
    assert always == {"win_rate": 1.0, "win_rate_interval": [0.8389, 1.0]}
    ties = win_rate(judged_rows([0.0] * 20), judged_rows([0.0] * 20))
    assert ties == {"win_rate": 0.5, "win_rate_interval": [0.2993, 0.7007]}


def test_only_replies_to_held_out_prompts_are_compared() -> None:
    """Replies about seen entities and greedy replies do not count; without held-out samples the rate is None."""
    others = judged_rows([9.0] * 5, split="train") + judged_rows([9.0] * 5, kind="greedy")
    before, after = judged_rows([0.0, 0.0]), judged_rows([-1.0, 1.0])
    assert win_rate(before + others, after + others)["win_rate"] == 0.5
    assert win_rate(others, others) == {"win_rate": None, "win_rate_interval": None}


# Gates


@pytest.mark.parametrize(
    ("gate", "value"),
    [
        ({"metric": "masked_names", "model": "encoder", "min": 0.95}, 0.95),
        ({"metric": "reward_mean", "model": "policy", "against": "tuned", "min": 1.1}, 1.1),
        ({"metric": "exact_match_heldout", "model": "policy", "against": "tuned", "min": -0.02}, -0.02),
        (
            {"metric": "distinct_2", "model": "policy", "against": "tuned", "relative": True, "min": 0.75, "max": 0.75},
            0.75,
        ),
        ({"metric": "accuracy", "model": "reward@train", "min": 0.82}, 0.82),
        ({"metric": "gap_at_least_1.model", "model": "reward@train", "max": 0.83}, 0.83),
    ],
)
def test_a_gate_has_its_value_and_passes_at_its_limit(gate: dict[str, Any], value: float) -> None:
    """A model's figure, its difference and ratio to another's, a stage's own figure, and a nested one."""
    result = check_gate(**gate)
    assert {**gate, "value": value, "passed": True} == result
    for name, step in (("min", 0.001), ("max", -0.001)):
        if name in gate:
            assert check_gate(**{**gate, name: gate[name] + step})["passed"] is False


@pytest.mark.parametrize(
    ("figures_by_model", "gate"),
    [
        (figures_with("encoder", masked_names=None), {"metric": "masked_names", "model": "encoder", "min": 0.0}),
        (FIGURES, {"metric": "masked_names", "model": "tuned", "min": 0.0}),
        (figures_with("tuned", reward_mean=None),
         {"metric": "reward_mean", "model": "policy", "against": "tuned", "max": 9.0}),
        (figures_with("tuned", distinct_2=0.0),
         {"metric": "distinct_2", "model": "policy", "against": "tuned", "relative": True, "min": 0.0}),
        (FIGURES, {"metric": "cut", "model": "reward@train", "max": 2.0}),
        (FIGURES, {"metric": "gap_at_least_1", "model": "reward@train", "max": 2.0}),
    ],
)  # fmt: skip
def test_a_figure_that_does_not_exist_fails(figures_by_model: Any, gate: dict[str, Any]) -> None:
    """`None` fails every gate; booleans and groups are not figures."""
    result = check_gate(figures_by_model, **gate)
    assert result["value"] is None
    assert result["passed"] is False
    assert "has no figure" in result["reason"] or "is 0, so nothing is relative to it" in result["reason"]


def test_gate_rounds_before_comparing() -> None:
    figures_by_model = figures_with("policy", exact_match_seen=0.95)
    assert 0.95 - 0.98 < -0.03
    assert (
        check_gate(figures_by_model, metric="exact_match_seen", model="policy", against="tuned", min=-0.03)["passed"]
        is True
    )


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"metric": "bytes", "model": "tuned"}, "a gate needs min or max, or both"),
        ({"metric": "bytes", "model": "tuned", "relative": True, "max": 1.0}, "relative needs against"),
    ],
)
def test_meaningless_gate_is_a_settings_error(gate: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Gate.model_validate(gate)


# Graph order


def links(**models: str) -> tuple[Link, ...]:
    """Return the tiny chain's entries, its evaluations those of these folders."""
    made = [link for link in training_fixtures.links() if link.stage != "evaluate"]
    return (*made, *(Link(f"evaluate@{name}", (folder,)) for name, folder in models.items()))


def test_models_are_listed_in_graph_order_and_then_as_in_the_file() -> None:
    ordered = links(
        served="data/quantize/chat/model", mine="models/mine", again="data/finetune/chat/model",
        base="data/pretrain/causal/model", tuned="data/finetune/chat/model",
    )  # fmt: skip
    assert [link.key for link in evaluations(ordered)] == ["mine", "base", "again", "tuned", "served"]


def test_a_model_is_compared_with_its_nearest_evaluated_ancestor() -> None:
    model_links = links(
        base="data/pretrain/causal/model", policy="data/align/policy/model", served="data/quantize/chat/model"
    )
    ancestors = {link.key: evaluated_ancestor(link, model_links) for link in evaluations(model_links)}
    assert ancestors == {"base": None, "policy": "base", "served": "policy"}


def test_wins_are_over_the_chat_model_before_the_first_alignment() -> None:
    """The chat model may be the user's own, but is never a base model."""
    model_links = links(
        base="data/pretrain/causal/model", policy="data/align/policy/model", served="data/quantize/chat/model"
    )
    assert [model_before_alignment(link, model_links) for link in evaluations(model_links)] == [
        None,
        None,
        None,
    ]
    twice = (
        Link("align@dpo", ("models/mine",)), Link("align@ppo", ("data/align/dpo/model",)),
        Link("evaluate@mine", ("models/mine",)), Link("evaluate@dpo", ("data/align/dpo/model",)),
        Link("evaluate@ppo", ("data/align/ppo/model",)),
    )  # fmt: skip
    assert [model_before_alignment(link, twice) for link in evaluations(twice)] == [
        None,
        "mine",
        "mine",
    ]


# The stage


def continuation_rows(score: float) -> list[dict[str, Any]]:
    """Return continuations of thirty prompts, every third of which draws one with this score."""
    return [
        {
            "id": f"p{n}", "entity": ("insult", "threat")[n % 2], "split": "heldout", "kind": "continuation",
            "question": f"Prompt {n}", "reply": f"continuation {n}", "toxicity": 0.1 if n % 3 else score,
        }
        for n in range(30)
    ]  # fmt: skip


def make_job(
    folder: Path, figures_by_model: dict[str, dict[str, Any]], more: dict[str, list[dict[str, Any]]] | None = None
) -> Job:
    """Write records and answers to a folder and return the job that compares them."""
    graph = training_fixtures.links()
    inputs = {name: folder / path for name, path in compare.graph_inputs(settings(), graph).items()}
    random = np.random.default_rng(0)
    for key, figures in figures_by_model.items():
        masked = "encoder" in key
        kind = "masked" if masked else "greedy"
        rate = figures.get("masked_names") or figures.get("exact_match_seen") or 0.0
        table = [
            {
                **row,
                "question": "?",
                "reply": "!",
                "extracted": None,
                "reference": "!",
                "reward": None,
                "judge_score": None,
            }
            for split in ("train", "heldout")
            for row in rows((random.random(50) < rate).tolist(), kind, split)
        ]
        if not masked:
            table += [
                {**row, "reward": 0.0, "judge_score": 1.0 if key == "policy" else 0.0}
                for row in judged_rows([0.0] * 4, split="heldout")
            ]
        table += (more or {}).get(key, [])
        evaluate._write_answers(table, inputs[f"answers of {key}"])
        write_json(
            inputs[f"record of evaluate@{key}"],
            {
                "metrics": {
                    "model": key,
                    "kind": "masked" if masked else "causal",
                    "evaluations": described(figures),
                    **figures,
                }
            },
        )
    for name, figures in OTHERS.items():
        write_json(inputs[f"record of {name}"], {"metrics": figures})
    outputs = {name: folder / Path(path).name for name, path in compare.OUTPUTS.items()}
    store = Checkpoints(url="memory://", every_seconds=1e9)
    sections = {"evaluations": training_fixtures.evaluations()}
    return Job("compare", None, inputs, outputs, 1, NUMERICS, "r", store, graph=graph, sections=sections)


def settings(resamples: int = 100) -> compare.Config:
    """Return settings with two gates."""
    return compare.Config.model_validate({"resamples": resamples, "gates": GATES})


def test_the_scorecard_shows_every_model_and_every_step(tmp_path: Path) -> None:
    """Models in graph order, rates with intervals, `None` where a figure does not apply; paired differences."""
    job = make_job(tmp_path, FIGURES)
    figures = compare.run(settings(200), job)
    assert [row["model"] for row in figures["models"]] == list(FIGURES)
    assert figures["models"][3]["made_by"] == "align@policy"
    for row in figures["models"]:
        assert {"exact_match_seen", "reward_mean", "distinct_2", "masked_names", "win_rate"} <= set(row)
        for rate in ("exact_match_seen", "exact_match_heldout", "masked_names"):
            between = row.get(f"{rate}_interval")
            assert (between is None) == (row[rate] is None)
            assert between is None or 0 <= between[0] <= between[1] <= 1
    steps = json.loads(job.outputs["differences"].read_text())
    assert [(step["from"], step["to"]) for step in steps if step["rate"] == "exact_match_seen"] == [
        ("base", "tuned"),
        ("tuned", "policy"),
        ("policy", "pruned"),
        ("pruned", "int8"),
    ]
    assert [(step["from"], step["to"]) for step in steps if step["rate"] == "masked_names"] == [
        ("encoder", "encoder-int8")
    ]
    assert all(step["interval"][0] <= step["change"] <= step["interval"][1] for step in steps)
    won = {row["model"]: (row["against"], row["win_rate"]) for row in figures["models"]}
    assert won == {
        **dict.fromkeys(FIGURES, (None, None)), "policy": ("tuned", 1.0), "pruned": ("tuned", 0.5),
        "int8": ("tuned", 0.5),
    }  # fmt: skip
    assert figures["toxicity"] is None
    json.dumps(figures, allow_nan=False)
    page = job.outputs["samples"].read_text(encoding="utf-8")
    assert [name for name in FIGURES if f"<b>{name}</b>" in page] == DECODERS
    assert len(re.findall(r"preferred to\s+tuned", page)) == 4


def test_nothing_evaluated_is_an_empty_scorecard(tmp_path: Path) -> None:
    """A graph may have no evaluations; gates on missing models are a settings error."""
    outputs = {name: tmp_path / Path(path).name for name, path in compare.OUTPUTS.items()}
    job = Job("compare", None, {}, outputs, 1, NUMERICS, "r", Checkpoints(url="memory://", every_seconds=1e9))
    figures = compare.run(compare.Config(resamples=100, gates=[]), job)
    assert figures == {"models": [], "gates": [], "evaluations": {}, "toxicity": None}


def test_a_failed_gate_does_not_stop_the_comparison(tmp_path: Path) -> None:
    """The scorecard is written; `package` fails instead."""
    figures = compare.run(settings(), make_job(tmp_path, figures_with("tuned", exact_match_seen=0.1)))
    assert [(gate["metric"], gate["passed"]) for gate in figures["gates"]] == [
        ("exact_match_seen", False), ("accuracy", True),
    ]  # fmt: skip


def test_toxicity_is_compared_before_and_after_alignment(tmp_path: Path) -> None:
    """By model and category with intervals, aligned against unaligned, and shown on the samples page."""
    classifier = {
        "file": "labelled.csv", "sha256": "ab" * 32, "trained_on": 80, "heldout": 20, "accuracy": 0.9, "auc": 0.95,
        "majority_class_accuracy": 0.6, "references_toxic": 0.0,
    }  # fmt: skip
    message = {"classifier": classifier, "ask": "text", "prompts": 30, "continuations": 30, "mean": 0.3, "toxic": 0.3}
    scores = {"base": 0.9, "tuned": 0.9, "policy": 0.2, "pruned": 0.2, "int8": 0.2}
    job = make_job(tmp_path, FIGURES, {key: continuation_rows(score) for key, score in scores.items()})
    for key in scores:
        record = json.loads(job.inputs[f"record of evaluate@{key}"].read_text())
        toxicity = {"kind": "toxicity", "applies_to": "Models.", "means": {}, **message}
        record["metrics"]["evaluations"]["toxicity"] = toxicity
        write_json(job.inputs[f"record of evaluate@{key}"], record)
    result = compare.run(settings(500), job)
    rows = {row["model"]: row for row in result["models"]}
    assert {key: row["toxic_share"] for key, row in rows.items()} == {
        **dict.fromkeys(FIGURES), "base": 0.3333, "tuned": 0.3333, "policy": 0.0, "pruned": 0.0, "int8": 0.0,
    }  # fmt: skip
    low, high = rows["tuned"]["toxic_share_interval"]
    assert low < 0.3333 < high
    table = result["toxicity"]
    assert table["classifier"] == classifier
    assert [item["category"] for item in table["categories"]] == [None, "insult", "threat"]
    change = table["categories"][0]["changes"]["policy"]["toxic_share"]
    assert change["change"] == -0.3333
    assert change["interval"][1] < 0
    steps = [step for step in json.loads(job.outputs["differences"].read_text()) if step["rate"] == "toxic_share"]
    assert {(step["from"], step["to"]): step["change"] for step in steps} == {
        ("base", "tuned"): 0.0, ("tuned", "policy"): -0.3333, ("policy", "pruned"): 0.0, ("pruned", "int8"): 0.0,
    }  # fmt: skip
    page = " ".join(job.outputs["samples"].read_text(encoding="utf-8").split())
    assert "trained on 80" in page
    assert "90.0 % on 20" in page
    assert page.count("continuation ") >= 5 * 2 * 5  # of the two categories five prompts by five models
