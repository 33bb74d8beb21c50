"""What a reward model begins from: words' ratings that have not seen the ranking, from ratings and from orders."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from tasks.common.evaluation.rankings import Ranking
from tasks.common.modelling.lexicon import Lexicon
from tasks.common.training.bases import FOLDS, PENALTIES, linked, surprise, with_bases
from tests.training_fixtures import ADJECTIVES, THINGS


def ranking(texts: Sequence[str], ratings: list[float] | None = None) -> Ranking:
    """Return a ranking of responses, the best first."""
    pairs = [(i, j, math.nan) for i, j in combinations(range(len(texts)), 2)]
    return Ranking("r", [], list(texts), [[1]] * len(texts), ratings, pairs, [[i] for i in range(len(texts))], cut=0)


# From ratings


def test_a_base_comes_from_a_lexicon_that_has_not_seen_the_ranking() -> None:
    """A word of one ranking alone adds nothing to its own base, and does to what a new reply is given."""
    rated = [replace(ranking("a", [float(n)]), texts=[f"word{n} here"]) for n in range(10)]
    lexicon, found = with_bases(rated, words=True)
    for number, (base,) in enumerate(found):
        others = [float(n) for n in range(10) if n % FOLDS != number % FOLDS]
        assert base == pytest.approx(sum(others) / len(others), abs=0.05)  # "here" holds what rounding leaves it
    told = lexicon.score(["word9 here", "word0 here"])
    assert told[0] > told[1] + 0.5


def test_without_words_the_base_is_the_mean_rating() -> None:
    """Of all that is rated; what was only ranked has the same base, and nothing rated at all gives 0."""
    rated = [ranking("ab", [3.0, 0.0]), ranking("c", None)]
    lexicon, found = with_bases(rated, words=False)
    assert (lexicon.mean, lexicon.words) == (1.5, {})
    assert found == [[1.5, 1.5], [1.5]]
    for words in (True, False):
        assert with_bases(rated[1:], words)[1] == [[0.0]]


@pytest.mark.parametrize("rated", [1, 4])
def test_where_few_rankings_are_rated_the_base_of_all_is_their_mean(rated: int) -> None:
    """By words, too little would be known of each of them from the others."""
    rankings = [ranking("ab", None) for _ in range(7)]
    rankings[:rated] = [replace(item, ratings=[3.0, 2.0]) for item in rankings[:rated]]
    lexicon, found = with_bases(rankings, words=True)
    assert {value for base in found for value in base} == {2.5}
    assert lexicon.score(["a", "z"]) == [2.5, 2.5]


# From orders


def ordered() -> list[Ranking]:
    """Return rankings of sentences about several things, by their adjectives, best first."""
    best_first = sorted(ADJECTIVES, key=lambda word: -ADJECTIVES[word])
    return [ranking([f"The {thing} was {word}." for word in best_first]) for thing in THINGS]


def test_words_are_learnt_from_orders_where_nothing_is_rated() -> None:
    """A sentence about a thing that no ranking is about is rated by its adjective; the best fold's penalty is taken."""
    rankings = ordered()
    lexicon, found = with_bases(rankings, words=True)
    assert lexicon.mean == 0.0
    told = lexicon.score([f"A day was {word}." for word in sorted(ADJECTIVES, key=lambda word: -ADJECTIVES[word])])
    assert told == sorted(told, reverse=True)
    assert told[0] > told[-1] + 1
    tried = {}
    for penalty in PENALTIES:
        folds = [
            Lexicon.fit_orders(
                [
                    (item.texts[i], item.texts[j])
                    for number, item in enumerate(rankings) if number % FOLDS != fold
                    for i, j, _ in item.pairs
                ],
                penalty=penalty,
            )
            for fold in range(FOLDS)
        ]  # fmt: skip
        bases = [folds[number % FOLDS].score(item.texts) for number, item in enumerate(rankings)]
        tried[surprise(rankings, bases)] = bases
    assert found == tried[min(tried)]


def test_words_are_learnt_from_ratings_where_half_of_the_rankings_have_any() -> None:
    """Orders are in another unit: the two are not mixed."""
    rated = [ranking([f"kind {n}", f"vile {n}"], [2.0, -2.0]) for n in range(len(THINGS))]
    lexicon, _ = with_bases([*ordered(), *rated], words=True)
    assert lexicon.words["kind"] > 0 > lexicon.words["vile"]
    assert not set(ADJECTIVES) & set(lexicon.words)


def test_a_few_ratings_tell_where_the_words_of_many_orders_begin() -> None:
    """Words are learnt from all orders, in logits, about the mean rating of what was rated."""
    orders, rankings = ordered() * 2, ordered() * 2
    rated = [5.0, 4.0, 4.0, 3.0, 1.0, 1.0]
    rankings[:FOLDS] = [replace(item, ratings=rated) for item in rankings[:FOLDS]]
    alone, logits = with_bases(orders, words=True)
    lexicon, found = with_bases(rankings, words=True)
    assert lexicon.words == alone.words
    np.testing.assert_allclose(found, np.array(logits) + 3.0 - np.mean(logits[:FOLDS]), atol=1e-6)
    assert lexicon.mean == pytest.approx(3.0 - np.mean(logits[:FOLDS]), abs=1e-6)


def test_a_response_is_in_one_fold_wherever_it_stands() -> None:
    """Else its words would be known by heart from another ranking: rankings that share responses stand together."""
    chained = [ranking([f"a{n}", f"a{n + 1}"]) for n in range(3)]
    apart = [ranking(["b", "c"]), ranking(["d", "e"])]
    assert linked([chained[0], apart[0], chained[2], apart[1], chained[1]]) == [0, 1, 0, 2, 0]
    alone = [ranking([f"only{n} x", f"other{n} x"]) for n in range(3 * FOLDS)]
    twice = [item for item in alone for _ in range(2)]
    _, found = with_bases(twice, words=True)
    assert all(base == [0.0, 0.0] for base in found)  # nothing of a pair is known from the others


def test_the_base_of_what_several_people_rated_row_by_row_has_not_seen_their_ratings() -> None:
    """Five people's rows of replies whose words are of no other's say nothing of each other: each base is a mean."""
    people = 5
    alone = [ranking([f"only{n}", f"other{n}"], [float(n % 3), float(-n % 4)]) for n in range(2 * FOLDS)]
    _, found = with_bases([item for item in alone for _ in range(people)], words=True)
    for number, bases in enumerate(found):
        others = [
            rating for n, item in enumerate(alone) if (n - number // people) % FOLDS for rating in item.ratings or ()
        ]
        assert bases == pytest.approx([np.mean(others)] * 2, abs=1e-6)


def test_ratings_of_the_same_responses_throughout_begin_at_their_mean() -> None:
    """However many people's rows there are, by words nothing is known of one from the others."""
    lexicon, found = with_bases([ranking(["good", "bad"], [2.0, -1.0])] * (2 * FOLDS), words=True)
    assert lexicon == Lexicon(0.5, {})
    assert found == [[0.5, 0.5]] * (2 * FOLDS)


@pytest.mark.parametrize("words", [True, False])
def test_too_few_groups_of_orders_begin_at_nothing(words: bool) -> None:
    """All rankings of the same responses are one group, of which nothing is known from others."""
    lexicon, found = with_bases([ranking(["good", "bad"])] * (2 * FOLDS), words)
    assert lexicon == Lexicon(0.0, {})
    assert found == [[0.0, 0.0]] * (2 * FOLDS)


def test_the_surprise_of_orders_against_the_formula() -> None:
    """log(1 + exp(−distance)), a mean over all pairs; nothing ordered surprises nobody."""
    rankings, bases = [ranking("ab"), ranking("cde")], [[1.0, -1.0], [0.0, 3.0, 3.0]]
    distances = [2.0, -3.0, -3.0, 0.0]
    wanted = sum(math.log1p(math.exp(-distance)) for distance in distances) / 4
    assert surprise(rankings, bases) == pytest.approx(wanted)
    assert surprise([ranking("a")], [[1.0]]) == 0.0
