"""The reward model: its loss by hand, pairwise accuracy, and scores that do not depend on the batch."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tasks.align import pairs
from tasks.align.rewards import Rankings
from tasks.common import tables
from tasks.common.harness.job import StageError
from tasks.common.modelling import head_models
from tasks.common.reward import agreement
from tasks.common.reward.lexicon import Lexicon
from tasks.common.reward.rankings import Ranking, read_ranking
from tasks.common.reward.ratings import mean_score
from tasks.common.reward.scoring import Scorer, encode_reply
from tasks.common.text.chat import Exchange
from tasks.common.training import losses
from tasks.common.training.loop import Shard
from tasks.reward import stage as reward
from tasks.validate.judgements import JudgementStatistics
from tests.training_fixtures import NUMERICS, Chain, chain, config, rankings

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain


def ranking(ratings: list[float] | None = None, ranks: list[int] | None = None) -> dict[str, Any]:
    """Return a row of the ranking table with one rater."""
    row = next(rankings())
    responses = [f"Reply {place}." for place in range(len(ratings or ranks or ()))]
    scores = None if ratings is None else [[rating] for rating in ratings]
    return {**row, "responses": responses, "scores": scores, "ranks": ranks}


def read_rankings(rows: list[dict[str, Any]], chain: Chain) -> list[Ranking]:
    """Return rows as the stage reads them."""
    return [read_ranking(row, chain.tokenizer(), 32, "response") for row in rows]


def exchanges(*replies: str) -> list[Exchange]:
    """Return replies to one prompt."""
    return [([{"role": "user", "content": "Write a sentence."}], reply) for reply in replies]


def group(texts: str, ratings: list[float] | None, **changes: Any) -> Ranking:
    """Return a ranking of one-letter replies without an order."""
    example = Ranking("r", [], list(texts), [[1]] * len(texts), ratings, [], [list(range(len(texts)))], truncated=0)
    return replace(example, **changes)


BRADLEY_TERRY = {"name": "bradley_terry", "weight": 0.3, "margin": 0.0}
PLACKETT_LUCE = {"name": "plackett_luce", "weight": 0.3}

# Losses


def test_a_batch_of_rankings_weighs_both_losses(chain: Chain, tmp_path: Path) -> None:
    """Rankings of different sizes, rated and only ranked, against each reply scored alone."""
    import torch

    rows = [ranking([2.0, -1.0, 0.5]), ranking(ranks=[2, 1]), ranking([1.0, 1.0])]
    rows[0]["responses"][1] = "A reply with far more words."
    rankings = [(item, [0.25 + place for place in range(len(item.texts))]) for item in read_rankings(rows, chain)]
    tokenizer = chain.tokenizer()
    model = head_models.load_scorer(chain.path("data/reward/train/model"), NUMERICS).eval()

    def score(text: str) -> float:
        ids = torch.tensor([encode_reply(tokenizer, text, 32)])
        value: float = model(input_ids=ids).logits[0, 0].item()
        return value

    scores = [[score(text) + 0.25 + place for place, text in enumerate(row["responses"])] for row in rows]
    squared_errors = [(scores[0][i] - rating) ** 2 for i, rating in enumerate((2.0, -1.0, 0.5))]
    squared_errors += [(scores[2][i] - 1.0) ** 2 for i in (0, 1)]
    wins = [(0, 0, 1, 3.0), (0, 0, 2, 1.5), (0, 2, 1, 1.5), (1, 1, 0, 0.0)]
    chances = [scores[r][better] - scores[r][worse] - 0.2 * gap for r, better, worse, gap in wins]
    chosen = [(0, 0, (0, 1, 2)), (0, 2, (1, 2)), (1, 1, (0, 1))]
    lists = [math.log(sum(math.exp(scores[r][i]) for i in among)) - scores[r][best] for r, best, among in chosen]
    for ordering, naive in (
        ({**BRADLEY_TERRY, "margin": 0.2}, [math.log1p(math.exp(-distance)) for distance in chances]),
        (PLACKETT_LUCE, lists),
    ):
        settings = config("reward", mse_weight=0.7, ordering=ordering, batch=3, word_dropout=0.0)
        judgements = reward.RankingObjective(
            settings, chain.job("reward@train", settings, tmp_path), model, tokenizer, *zip(*rankings, strict=True)
        )
        batch = judgements.draw(0, Shard())
        assert judgements.weights == {"rating": 0.7, "ordering": 0.3}
        assert batch.target_counts == {"rating": 5, "ordering": len(naive)}
        assert batch.tokens == sum(len(ids) for item, _ in rankings for ids in item.ids)
        loss_values = {name: value.item() for name, value in judgements.loss_sums(batch).items()}
        assert loss_values == pytest.approx({"rating": sum(squared_errors), "ordering": sum(naive)}, rel=1e-4)


def test_a_term_without_weight_is_omitted(chain: Chain, tmp_path: Path) -> None:
    """It is not part of the loss or of the history."""
    settings = config("reward", mse_weight=0.0, steps=2)
    job = chain.job("reward@train", settings, tmp_path)
    assert {name for name in chain.run(job, settings) if "loss" in name} == {"loss"}


# Rankings


def test_ratings_order_pairs_and_ties_order_none(chain: Chain) -> None:
    """Pairs and gaps come from the raters' means; ties make no pair."""
    row = ranking([3.0, -1.0, 3.0])
    row["scores"] = [[2.0, 4.0], [-1.0, -1.0], [3.0, 3.0]]
    (read_back,) = read_rankings([row], chain)
    assert read_back.ratings == [3.0, -1.0, 3.0]
    assert read_back.pairs == [(0, 1, 4.0), (2, 1, 4.0)]
    assert read_back.order == [[0, 2], [1]]


EQUAL_MEANS: list[list[list[float]]] = [
    [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]],
    [[0.7, 0.7, 0.7], [0.7]],
    [[0.1, 0.3], [0.2, 0.2], [0.2]],
    [[0.1, 0.2, -0.3], [0.0]],
    [[99.1, 99.3], [99.2]],
]


@pytest.mark.parametrize("stored", [np.float64, np.float32])
@pytest.mark.parametrize("scores", EQUAL_MEANS)
def test_replies_with_equal_means_are_tied_in_every_reader(
    scores: list[list[float]], stored: type[np.floating[Any]], chain: Chain
) -> None:
    """In the reward model, in DPO and in validation, as given and as stored in tables."""
    row = ranking([0.0] * len(scores))
    row |= {"scores": [np.array(values, stored).tolist() for values in scores], "scale": [-100.0, 100.0]}
    (read_back,) = read_rankings([row], chain)
    assert (read_back.pairs, read_back.order) == ([], [list(range(len(scores)))])
    ranked = Rankings(name="rankings", path="data/validate/rankings", judge_share=0.0, input="response")
    with pytest.raises(StageError, match="no response that beats another"):
        pairs.from_rankings(chain.tokenizer(), [{**row, "split": "train"}], ranked)
    statistics = JudgementStatistics()
    statistics.add({**row, "annotator": None, "source": "s"})
    (figures,) = statistics.figures()["s"].values()
    assert (figures["undecided"], figures["pairs"], figures["rating_length_correlation"]) == (1, 0, None)


def test_mean_of_scores_is_correctly_rounded() -> None:
    """Against fractions; for whole numbers it equals plain division."""
    draws = np.random.default_rng(3)
    for _ in range(200):
        tenths = draws.integers(-40, 41, draws.integers(1, 30)).tolist()
        assert mean_score([tenth / 10 for tenth in tenths]) == float(Fraction(sum(tenths), 10 * len(tenths)))
        assert mean_score([float(tenth) for tenth in tenths]) == sum(tenths) / len(tenths)


def test_ranks_order_pairs_without_a_gap(chain: Chain) -> None:
    """1 is best, ties make no pair, and gaps are unknown."""
    (read_back,) = read_rankings([ranking(ranks=[2, 1, 2, 4])], chain)
    assert read_back.ratings is None
    assert [(better, worse) for better, worse, _ in read_back.pairs] == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]
    assert all(math.isnan(gap) for *_, gap in read_back.pairs)
    assert read_back.order == [[1], [0, 2], [3]]


def test_long_replies_are_cut(chain: Chain) -> None:
    """To the tokens that the model reads; words are still counted over the whole reply."""
    row = ranking([1.0, 2.0])
    row["responses"][0] = "word " * 100
    (example,) = read_rankings([row], chain)
    assert list(map(len, example.ids)) == [32, len(encode_reply(chain.tokenizer(), "Reply 1.", 32))]
    assert example.texts[0] == "word " * 100


def test_word_dropout_masks_tokens_at_random() -> None:
    """The given share of tokens becomes the mask token, never the start token; the ranking itself is not changed."""
    item = group("ab", [1.0, 2.0], ids=[[1, *range(10, 1010)], [1, *range(10, 1010)]])
    hidden = reward.mask_tokens(item, 0.3, 3, np.random.default_rng(0))
    for ids in hidden.ids:
        assert ids[0] == 1
        assert all(token in (3, place + 9) for place, token in enumerate(ids) if place)
        assert ids.count(3) / 1000 == pytest.approx(0.3, abs=0.06)  # four standard deviations
    assert hidden.ids[0] != hidden.ids[1]
    assert 3 not in item.ids[0]
    assert reward.mask_tokens(item, 0.0, 3, np.random.default_rng(0)) == item


# Judging


class FixedScorer:
    """A scorer with given scores."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def score_with_std(self, exchanges: list[Exchange], desc: str | None = None) -> tuple[list[float], list[float]]:
        """Return the given scores and zero deviations."""
        return [self.scores[reply] for _, reply in exchanges], [0.0] * len(exchanges)


@pytest.mark.parametrize("texts", [["very very good film", "bad film"], ["很好看", "差"]])
def test_length_correlation_works_without_spaces(texts: list[str]) -> None:
    """A model that prefers longer replies is detected in any script."""
    scorer: Any = FixedScorer(dict(zip(texts, [2.0, 1.0], strict=True)))
    heldout = replace(group("ab", [2.0, 1.0], pairs=[(0, 1, 1.0)]), texts=texts)
    correlation = agreement.pairwise_agreement(scorer, [heldout], {})["length"]
    assert correlation == {
        "correlation": 1.0, "correlation_of_raters": 1.0, "longer_first": 1.0, "longer_first_by_people": 1.0
    }  # fmt: skip


def test_accuracy_is_the_share_of_pairs_in_peoples_order() -> None:
    """By gap, and for rankings without ratings; equal scores count as wrong."""
    heldout = [
        group("abc", [2.0, 1.7, -1.0], pairs=[(0, 1, 0.3), (0, 2, 3.0), (1, 2, 2.7)]),
        group("de", None, pairs=[(0, 1, math.nan)]),
        group("fg", [1.0, 0.0], pairs=[(0, 1, 1.0)]),
    ]
    scorer: Any = FixedScorer({"a": 0.5, "b": 0.9, "c": -2.0, "d": 1.0, "e": 0.0, "f": 0.4, "g": 0.4})
    figures = agreement.pairwise_agreement(scorer, heldout, {"bag_of_words": None})
    shares = {gap: (figures[f"gap_at_least_{gap}"]["pairs"], figures[f"gap_at_least_{gap}"]["model"]) for gap in "12"}
    assert (figures["gap_at_least_0.2"]["pairs"], figures["gap_at_least_0.2"]["model"]) == (4, 0.5)
    assert shares == {"1": (3, 0.6667), "2": (2, 1.0)}
    assert figures["ranked_only"] == {"pairs": 1, "model": 1.0, "bag_of_words": None}
    assert figures["heldout_pairs"] == 5


def test_no_heldout_rankings_give_no_figures() -> None:
    """No division by zero and no accuracy of 0."""
    scorer: Any = FixedScorer({})
    assert agreement.pairwise_agreement(scorer, [], {}) == {"heldout_pairs": 0}


def test_calibration_compares_predictions_with_people() -> None:
    """Bins of equal size in order of the prediction, with both means."""
    rating_pairs = [(float(number), float(number) + 0.5) for number in range(20)]
    bins = agreement.calibration(rating_pairs[::-1], bins=4)
    assert bins == [{"predicted": 5.0 * k + 2, "rated": 5.0 * k + 2.5} for k in range(4)]
    assert len(agreement.calibration(rating_pairs[:3], bins=10)) == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_ordering_loss_is_that_of_trl(chain: Chain, tmp_path: Path) -> None:
    """TRL's RewardTrainer has the same Bradley–Terry loss on the same pairs."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs = [("It was good.", "It was terrible."), ("A kind song about the garden.", "No."), ("Fine.", "It was good.")]
    tokenizer, model = chain.tokenizer(), head_models.load_scorer(chain.path("data/reward/train/model"), NUMERICS)
    rows = [[encode_reply(tokenizer, text, 32) for text in pair] for pair in pairs]
    settings = RewardConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=3, bf16=False, use_cpu=True, report_to="none",
        disable_tqdm=True, disable_dropout=True,
    )  # fmt: skip
    dataset = Dataset.from_list([{"chosen_ids": better, "rejected_ids": worse} for better, worse in rows])
    trainer = RewardTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer)
    [batch] = trainer.get_train_dataloader()
    theirs = trainer.compute_loss(model.eval(), batch).item()
    numerics = chain.job("reward@train", config("reward"), tmp_path).numerics
    pairs_of_places = [(place, place + 1, 1.0) for place in (0, 2, 4)]
    scores = head_models.head_outputs(model, tokenizer, [ids for pair in rows for ids in pair], numerics, 16)[:, 0]
    assert losses.bradley_terry(scores, pairs_of_places).item() / 3 == pytest.approx(theirs, rel=1e-5)


# Scores


def test_scores_do_not_depend_on_the_batch(chain: Chain) -> None:
    """Padding, batching and order change nothing; the lexicon's score is added."""
    import torch

    scorer = Scorer.load(chain.path("data/reward/train/model"), NUMERICS)
    texts = ["It was good.", "A very long reply about the garden, the song and the soup.", "", "It was terrible."]
    together = scorer.score(exchanges(*texts, *texts[::-1]), batch_size=3)
    single = [scorer.score(exchanges(text))[0] for text in texts]
    assert together == pytest.approx([*single, *single[::-1]], abs=1e-5)  # float32, sums in another order
    ids = torch.tensor([encode_reply(scorer.tokenizer, texts[0], 64)])
    plain = scorer.model(input_ids=ids).logits[0, 0].item()
    assert single[0] == pytest.approx(plain + scorer.lexicon.score(texts[:1])[0], abs=1e-5)
    assert scorer.lexicon.words


def test_long_replies_are_scored_by_what_the_model_reads(chain: Chain) -> None:
    """A reply longer than the limit is scored by its beginning."""
    scorer = replace(Scorer.load(chain.path("data/reward/train/model"), NUMERICS), lexicon=Lexicon(0.0, {}))
    long = scorer.score(exchanges("It was good. " * 30, "It was good. " * 30 + "It was terrible. " * 10))
    assert long[0] == pytest.approx(long[1], abs=1e-5)  # float32; a row's place in a batch changes the order of sums


def test_scores_stay_on_the_rating_scale(chain: Chain) -> None:
    """Lexicon scores are unbounded and are clipped to the scale; without ratings there is none."""
    scorer = Scorer.load(chain.path("data/reward/train/model"), NUMERICS)
    assert scorer.scale == [-4.0, 4.0]
    gushing = replace(scorer, lexicon=Lexicon(0.0, {"kind": 50.0, "vile": -50.0}))
    assert gushing.score(exchanges("kind", "vile")) == [4.0, -4.0]
    assert replace(gushing, scale=None).score(exchanges("kind"))[0] > 40


# The stage


def test_truncated_responses_are_counted_and_reported(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    row = ranking(ratings=[1.0, 2.0, 3.0]) | {"responses": ["Yes.", "word " * 40, "word " * 50]}
    (read_back,) = read_rankings([row], chain)
    assert read_back.truncated == 2
    reward.report_truncated([read_back, *read_rankings([ranking([1.0, 2.0])], chain)], 32)
    assert capsys.readouterr().out.startswith("2 of 5 responses have more than the 32 tokens of reward.max_tokens")
    reward.report_truncated(read_rankings([ranking([1.0, 2.0])], chain), 32)
    assert not capsys.readouterr().out
    assert [len(ids) for ids in read_back.ids][1:] == [32, 32]
    assert len(read_back.ids[0]) < 32


@pytest.mark.parametrize(
    ("base", "words", "ordering"),
    [
        ("data/pretrain/masked/model", True, BRADLEY_TERRY),
        ("data/pretrain/masked/model", False, PLACKETT_LUCE),
        ("data/finetune/chat/model", True, PLACKETT_LUCE),
        ("data/finetune/chat/model", False, BRADLEY_TERRY),
    ],
)
def test_a_reward_model_learns_peoples_order(
    base: str, words: bool, ordering: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """On encoder and decoder: held-out sentences are ordered by their adjectives, on the raters' scale."""
    settings = config("reward", model=base, lexicon=words, ordering=ordering)
    job = chain.job("reward@train", settings, tmp_path)
    metrics = chain.run(job, settings)
    assert metrics["rankings"] == 6
    assert metrics["heldout_pairs"] == 6 + 6 + 2
    assert metrics["gap_at_least_1"]["model"] >= 0.9
    assert metrics["gap_at_least_1"]["bag_of_words"] >= 0.9
    scorer = Scorer.load(job.outputs["model"], NUMERICS)
    good, bad = scorer.score(exchanges("The soup was wonderful.", "The soup was terrible."))
    assert good == pytest.approx(4.0, abs=1.5)
    assert bad == pytest.approx(-4.0, abs=1.5)


def test_orders_of_rated_responses_have_scores_without_bounds(chain: Chain, tmp_path: Path) -> None:
    """Scores are logits; clipping them to a short scale would make most of them equal."""
    settings = config("reward", mse_weight=0.0, ordering={**BRADLEY_TERRY, "weight": 1.0}, steps=1)
    job = chain.job("reward@train", settings, tmp_path)
    chain.run(job, settings)
    assert Scorer.load(job.outputs["model"], NUMERICS).scale is None


def test_orders_alone_teach_words_and_model(chain: Chain, tmp_path: Path) -> None:
    """Without any rating the lexicon orders the adjectives, and its accuracy is reported beside the model's."""
    rows = []
    for row in (row for row in rankings() if row["scores"]):
        means = [sum(scores) / len(scores) for scores in row["scores"]]
        rows.append({**row, "scores": None, "scale": None, "ranks": [sorted(means)[::-1].index(m) + 1 for m in means]})
    settings = config("reward", mse_weight=0.0, ordering={**BRADLEY_TERRY, "weight": 1.0}, judge_share=1e-9)
    job = chain.job("reward@train", settings, tmp_path)
    job.inputs["rankings"] = tmp_path / "table"
    tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
    metrics = chain.run(job, settings)
    assert metrics["ranked_only"]["model"] >= 0.9
    assert metrics["ranked_only"]["bag_of_words"] >= 0.9
    assert metrics["ranked_only"]["bag_of_words_and_bigrams"] is None
    scorer = Scorer.load(job.outputs["model"], NUMERICS)
    assert scorer.scale is None
    assert scorer.lexicon.words["wonderful"] > scorer.lexicon.words["terrible"]
    good, bad = scorer.score(exchanges("The soup was wonderful.", "The soup was terrible."))
    assert good > bad


def test_two_zero_loss_weights_are_rejected() -> None:
    """The loss would be constant."""
    with pytest.raises(ValidationError, match=r"mse_weight and ordering\.weight are both 0"):
        config("reward", mse_weight=0.0, ordering={**BRADLEY_TERRY, "weight": 0.0})


@pytest.mark.parametrize(
    ("rows", "changes", "sentence"),
    [
        ([], {}, "no ranking is left to train on"),
        (
            [ranking(ranks=[1, 2])],
            {"ordering": {**BRADLEY_TERRY, "weight": 0.0}},
            "1 rankings have ranks and no scores",
        ),
        (
            [ranking([1.0, 2.0]), ranking([1.0, 2.0]), {**ranking([1.0, 2.0]), "scale": [0.0, 5.0]}],
            {},
            r"different scales \(-4 to 4 in 2; 0 to 5 in 1 rankings\)",
        ),
    ],
)
def test_unusable_rankings_are_rejected(
    rows: list[dict[str, Any]], changes: dict[str, Any], sentence: str, chain: Chain, tmp_path: Path
) -> None:
    """An empty table, ranks without a loss that uses them, and different scales."""
    settings = config("reward", steps=1, **changes)
    job = chain.job("reward@train", settings, tmp_path)
    job.inputs["rankings"] = tmp_path / "table"
    tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
    with pytest.raises(StageError, match=sentence):
        chain.run(job, settings)
