"""Base scores of a reward model: a linear lexicon of whole words, whose residual the model learns.

The lexicon is fitted to ratings if at least half of the rankings have any, else to the orders of all rankings, shifted
to the mean of the existing ratings. A ranking's base score comes from a lexicon fitted without it (out of fold, Wolpert
1992, "Stacked generalization"): an in-sample lexicon overfits, and the model would learn too small a correction. A
response may occur in several rankings, one per annotator; rankings that share a response are in one fold.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tasks.common.reward.lexicon import Lexicon
from tasks.common.reward.rankings import Ranking

FOLD_COUNT = 5  # for out-of-fold base scores
ORDER_PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # L2 penalties tried for a lexicon fitted to orders

Bases = list[list[float]]  # base score of each response of each ranking


def fit_bases(rankings: Sequence[Ranking], words: bool) -> tuple[Lexicon, Bases]:
    """Return the lexicon of all rankings, and for each ranking the out-of-fold base scores for training.

    With fewer groups of rankings than folds (rankings that share a response form a group) no words are fitted: the base
    score is the mean rating, or 0.
    """
    if not words or mostly_rated(rankings):
        return _fit_from_ratings(rankings, words)
    lexicon, bases = _fit_from_orders(rankings)
    offset = _mean_offset(rankings, bases)
    return replace(lexicon, mean=lexicon.mean + offset), [[value + offset for value in base] for base in bases]


def mostly_rated(rankings: Sequence[Ranking]) -> bool:
    """Return whether at least half of the rankings have ratings; the lexicon is then fitted in the ratings' unit."""
    return 2 * sum(ranking.ratings is not None for ranking in rankings) >= len(rankings)


def fit_lexicon(rankings: Sequence[Ranking], *, words: bool = True, bigrams: bool = False) -> Lexicon:
    """Return the lexicon fitted to the rankings that have ratings."""
    rated = [item for ranking in rankings for item in zip(ranking.texts, ranking.ratings or (), strict=False)]
    return Lexicon.fit([text for text, _ in rated], [value for _, value in rated], words=words, bigrams=bigrams)


def response_groups(rankings: Sequence[Ranking]) -> list[int]:
    """Return each ranking's group: connected components of rankings that share responses, in order of appearance."""
    parents = list(range(len(rankings)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first: dict[str, int] = {}
    for position, ranking in enumerate(rankings):
        for text in ranking.texts:
            low, high = sorted((root(first.setdefault(text, position)), root(position)))
            parents[high] = low
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(position), len(numbers)) for position in range(len(rankings))]


def _fit_from_ratings(rankings: Sequence[Ranking], words: bool) -> tuple[Lexicon, Bases]:
    groups = response_groups(rankings)
    rated = {group for ranking, group in zip(rankings, groups, strict=True) if ranking.ratings is not None}
    lexicon = fit_lexicon(rankings, words=words and len(rated) >= FOLD_COUNT)
    if not lexicon.words:
        return lexicon, _score_with_one(lexicon, rankings)
    folds = [
        fit_lexicon([item for item, group in zip(rankings, groups, strict=True) if group % FOLD_COUNT != fold])
        for fold in range(FOLD_COUNT)
    ]
    return lexicon, _score_each([folds[group % FOLD_COUNT] for group in groups], rankings)


def _fit_from_orders(rankings: Sequence[Ranking]) -> tuple[Lexicon, Bases]:
    """Fit lexicons to orders, with the penalty of the lowest out-of-fold negative log-likelihood."""
    groups = response_groups(rankings)
    if len(set(groups)) < FOLD_COUNT:
        return Lexicon(0.0, {}), _score_with_one(Lexicon(0.0, {}), rankings)
    results = {}
    for penalty in ORDER_PENALTIES:
        folds = [
            _fit_orders(
                [item for item, group in zip(rankings, groups, strict=True) if group % FOLD_COUNT != fold], penalty
            )
            for fold in range(FOLD_COUNT)
        ]
        bases = _score_each([folds[group % FOLD_COUNT] for group in groups], rankings)
        results[penalty] = (pairwise_nll(rankings, bases), bases)
    best = min(results, key=lambda penalty: results[penalty][0])
    return _fit_orders(rankings, best), results[best][1]


def _mean_offset(rankings: Sequence[Ranking], bases: Bases) -> float:
    """Return the offset that moves the mean base score of rated responses to their mean rating; 0 without ratings.

    Logits are not rescaled: they are the unit in which the model learns from orders, which are the majority here.
    """
    rated = [(base, ranking.ratings) for ranking, base in zip(rankings, bases, strict=True) if ranking.ratings]
    residuals = [rating - value for base, ratings in rated for value, rating in zip(base, ratings, strict=True)]
    return round(math.fsum(residuals) / len(residuals), 6) if residuals else 0.0


def _fit_orders(rankings: Sequence[Ranking], penalty: float) -> Lexicon:
    pairs = [(ranking.texts[i], ranking.texts[j]) for ranking in rankings for i, j, _ in ranking.pairs]
    return Lexicon.fit_preferences(pairs, penalty=penalty)


def pairwise_nll(rankings: Sequence[Ranking], bases: Bases) -> float:
    """Return the mean Bradley–Terry loss of the ordered pairs (nats); 0 without any."""
    score_gaps = [base[i] - base[j] for ranking, base in zip(rankings, bases, strict=True) for i, j, _ in ranking.pairs]
    return math.fsum(np.logaddexp(0, -np.array(score_gaps)).tolist()) / max(len(score_gaps), 1)


def _score_with_one(lexicon: Lexicon, rankings: Sequence[Ranking]) -> Bases:
    return _score_each([lexicon] * len(rankings), rankings)


def _score_each(lexicons: Sequence[Lexicon], rankings: Sequence[Ranking]) -> Bases:
    return [lexicon.score(ranking.texts) for lexicon, ranking in zip(lexicons, rankings, strict=True)]
