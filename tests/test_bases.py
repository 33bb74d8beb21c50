"""Base scores of a reward model: out-of-fold lexicons, fitted to ratings and to orders."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from tasks.common.reward.lexicon import Lexicon
from tasks.common.reward.rankings import Ranking
from tasks.reward.bases import FOLD_COUNT, ORDER_PENALTIES, fit_bases, pairwise_nll, response_groups
from tests.training_fixtures import ADJECTIVES, THINGS


def ranking(texts: Sequence[str], ratings: list[float] | None = None) -> Ranking:
    """Return a ranking of responses, the best first."""
    pairs = [(i, j, math.nan) for i, j in combinations(range(len(texts)), 2)]
    return Ranking(
        "r", [], list(texts), [[1]] * len(texts), ratings, pairs, [[i] for i in range(len(texts))], truncated=0
    )


# From ratings


def test_bases_are_out_of_fold() -> None:
    """A word of a single ranking changes the scores of new replies but not its own base score."""
    rated = [replace(ranking("a", [float(n)]), texts=[f"word{n} here"]) for n in range(10)]
    lexicon, bases = fit_bases(rated, words=True)
    for number, (base,) in enumerate(bases):
        others = [float(n) for n in range(10) if n % FOLD_COUNT != number % FOLD_COUNT]
        assert base == pytest.approx(
            sum(others) / len(others), abs=0.05
        )  # the weight of "here" is only a rounding error
    scores = lexicon.score(["word9 here", "word0 here"])
    assert scores[0] > scores[1] + 0.5


def test_without_words_the_base_is_the_mean_rating() -> None:
    """Also for rankings without ratings; without any rating it is 0."""
    rated = [ranking("ab", [3.0, 0.0]), ranking("c", None)]
    lexicon, bases = fit_bases(rated, words=False)
    assert (lexicon.mean, lexicon.words) == (1.5, {})
    assert bases == [[1.5, 1.5], [1.5]]
    for words in (True, False):
        assert fit_bases(rated[1:], words)[1] == [[0.0]]


@pytest.mark.parametrize("rated", [1, 4])
def test_bases_with_few_rated_rankings_are_the_mean_rating(rated: int) -> None:
    """There are too few ratings for out-of-fold lexicons."""
    rankings = [ranking("ab", None) for _ in range(7)]
    rankings[:rated] = [replace(item, ratings=[3.0, 2.0]) for item in rankings[:rated]]
    lexicon, bases = fit_bases(rankings, words=True)
    assert {value for base in bases for value in base} == {2.5}
    assert lexicon.score(["a", "z"]) == [2.5, 2.5]


# From orders


def ordered() -> list[Ranking]:
    """Return rankings of sentences about several things, by their adjectives, best first."""
    best_first = sorted(ADJECTIVES, key=lambda word: -ADJECTIVES[word])
    return [ranking([f"The {thing} was {word}." for word in best_first]) for thing in THINGS]


def test_lexicon_without_ratings_learns_from_orders() -> None:
    """An unseen sentence is scored by its adjective; the penalty with the best out-of-fold loss is used."""
    rankings = ordered()
    lexicon, bases = fit_bases(rankings, words=True)
    assert lexicon.mean == 0.0
    scores = lexicon.score([f"A day was {word}." for word in sorted(ADJECTIVES, key=lambda word: -ADJECTIVES[word])])
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1] + 1
    losses = {}
    for penalty in ORDER_PENALTIES:
        folds = [
            Lexicon.fit_preferences(
                [
                    (item.texts[i], item.texts[j])
                    for number, item in enumerate(rankings) if number % FOLD_COUNT != fold
                    for i, j, _ in item.pairs
                ],
                penalty=penalty,
            )
            for fold in range(FOLD_COUNT)
        ]  # fmt: skip
        fold_bases = [folds[number % FOLD_COUNT].score(item.texts) for number, item in enumerate(rankings)]
        losses[pairwise_nll(rankings, fold_bases)] = fold_bases
    assert bases == losses[min(losses)]


def test_lexicon_with_half_of_rankings_rated_learns_from_ratings() -> None:
    """Orders are in another unit and are not mixed in."""
    rated = [ranking([f"kind {n}", f"vile {n}"], [2.0, -2.0]) for n in range(len(THINGS))]
    lexicon, _ = fit_bases([*ordered(), *rated], words=True)
    assert lexicon.words["kind"] > 0 > lexicon.words["vile"]
    assert not set(ADJECTIVES) & set(lexicon.words)


def test_few_ratings_shift_the_lexicon_of_orders() -> None:
    """The lexicon is fitted to all orders, in logits, and shifted to the mean rating."""
    orders, rankings = ordered() * 2, ordered() * 2
    rated = [5.0, 4.0, 4.0, 3.0, 1.0, 1.0]
    rankings[:FOLD_COUNT] = [replace(item, ratings=rated) for item in rankings[:FOLD_COUNT]]
    orders_only, logits = fit_bases(orders, words=True)
    lexicon, bases = fit_bases(rankings, words=True)
    assert lexicon.words == orders_only.words
    np.testing.assert_allclose(bases, np.array(logits) + 3.0 - np.mean(logits[:FOLD_COUNT]), atol=1e-6)
    assert lexicon.mean == pytest.approx(3.0 - np.mean(logits[:FOLD_COUNT]), abs=1e-6)


def test_rankings_that_share_a_response_are_in_one_fold() -> None:
    """Otherwise the lexicon would have memorized the response from another ranking."""
    chained = [ranking([f"a{n}", f"a{n + 1}"]) for n in range(3)]
    separate = [ranking(["b", "c"]), ranking(["d", "e"])]
    assert response_groups([chained[0], separate[0], chained[2], separate[1], chained[1]]) == [0, 1, 0, 2, 0]
    distinct = [ranking([f"only{n} x", f"other{n} x"]) for n in range(3 * FOLD_COUNT)]
    twice = [item for item in distinct for _ in range(2)]
    _, bases = fit_bases(twice, words=True)
    assert all(base == [0.0, 0.0] for base in bases)  # the other rankings share no words with a pair


def test_bases_of_ratings_by_several_annotators_are_out_of_fold() -> None:
    """Rows of five annotators whose replies share no words with others: each base score is a mean."""
    people = 5
    distinct = [ranking([f"only{n}", f"other{n}"], [float(n % 3), float(-n % 4)]) for n in range(2 * FOLD_COUNT)]
    _, bases = fit_bases([item for item in distinct for _ in range(people)], words=True)
    for number, pair in enumerate(bases):
        others = [
            rating
            for n, item in enumerate(distinct)
            if (n - number // people) % FOLD_COUNT
            for rating in item.ratings or ()
        ]
        assert pair == pytest.approx([np.mean(others)] * 2, abs=1e-6)


def test_ratings_of_identical_responses_give_their_mean() -> None:
    """All rows are one group, so no words are fitted."""
    lexicon, bases = fit_bases([ranking(["good", "bad"], [2.0, -1.0])] * (2 * FOLD_COUNT), words=True)
    assert lexicon == Lexicon(0.5, {})
    assert bases == [[0.5, 0.5]] * (2 * FOLD_COUNT)


@pytest.mark.parametrize("words", [True, False])
def test_too_few_groups_of_orders_give_a_zero_base(words: bool) -> None:
    """All rankings of the same responses are one group, so no words are fitted."""
    lexicon, bases = fit_bases([ranking(["good", "bad"])] * (2 * FOLD_COUNT), words)
    assert lexicon == Lexicon(0.0, {})
    assert bases == [[0.0, 0.0]] * (2 * FOLD_COUNT)


def test_pairwise_nll_matches_the_formula() -> None:
    """log(1 + exp(−gap)), the mean over all pairs; 0 without any pair."""
    rankings, bases = [ranking("ab"), ranking("cde")], [[1.0, -1.0], [0.0, 3.0, 3.0]]
    distances = [2.0, -3.0, -3.0, 0.0]
    wanted = sum(math.log1p(math.exp(-distance)) for distance in distances) / 4
    assert pairwise_nll(rankings, bases) == pytest.approx(wanted)
    assert pairwise_nll([ranking("a")], [[1.0]]) == 0.0
