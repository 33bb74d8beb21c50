"""What a reward model begins from: ratings of whole words, of which it learns what they miss.

Words are learnt from ratings where half of the rankings or more have any, and else from the orders of all, about
the mean of what ratings there are. A ranking's base comes from a lexicon that has not seen it (out of fold, Wolpert
1992, "Stacked generalization"): of what it has seen a lexicon knows too much, and the model would learn to correct too
little. A response may be in many rankings, one of each annotator: those that share any are in one fold.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tasks.common.evaluation.rankings import Ranking
from tasks.common.modelling.lexicon import Lexicon

FOLDS = 5  # of the rankings, so that each can be rated by words without being among those learnt from
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # on words that are learnt from orders

Bases = list[list[float]]  # of each response of each ranking


def with_bases(rankings: Sequence[Ranking], words: bool) -> tuple[Lexicon, Bases]:
    """Return the lexicon of all rankings, and for each ranking the base that the model is trained on.

    Of fewer rankings than there are folds, those that share responses counted as one, nothing is known by words: the
    base is their mean rating, or 0.
    """
    if not words or mostly_rated(rankings):
        return _of_ratings(rankings, words)
    lexicon, bases = _of_orders(rankings)
    start = _start(rankings, bases)
    return replace(lexicon, mean=lexicon.mean + start), [[value + start for value in base] for base in bases]


def mostly_rated(rankings: Sequence[Ranking]) -> bool:
    """Return whether half of the rankings or more have ratings, in whose unit words are then learnt."""
    return 2 * sum(ranking.ratings is not None for ranking in rankings) >= len(rankings)


def fit_lexicon(rankings: Sequence[Ranking], *, words: bool = True, bigrams: bool = False) -> Lexicon:
    """Return the lexicon of the rankings that hold ratings."""
    rated = [item for ranking in rankings for item in zip(ranking.texts, ranking.ratings or (), strict=False)]
    return Lexicon.fit([text for text, _ in rated], [value for _, value in rated], words=words, bigrams=bigrams)


def linked(rankings: Sequence[Ranking]) -> list[int]:
    """Return each ranking's group, numbered by first appearance: those that share responses, if only through others."""
    parents = list(range(len(rankings)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    first: dict[str, int] = {}
    for place, ranking in enumerate(rankings):
        for text in ranking.texts:
            low, high = sorted((root(first.setdefault(text, place)), root(place)))
            parents[high] = low
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(place), len(numbers)) for place in range(len(rankings))]


def _of_ratings(rankings: Sequence[Ranking], words: bool) -> tuple[Lexicon, Bases]:
    groups = linked(rankings)
    rated = {group for ranking, group in zip(rankings, groups, strict=True) if ranking.ratings is not None}
    lexicon = fit_lexicon(rankings, words=words and len(rated) >= FOLDS)
    if not lexicon.words:
        return lexicon, _alike(lexicon, rankings)
    folds = [
        fit_lexicon([item for item, group in zip(rankings, groups, strict=True) if group % FOLDS != fold])
        for fold in range(FOLDS)
    ]
    return lexicon, _scored([folds[group % FOLDS] for group in groups], rankings)


def _of_orders(rankings: Sequence[Ranking]) -> tuple[Lexicon, Bases]:
    """Take the penalty under which the folds' lexicons, together, find the orders that they have not seen likeliest."""
    groups = linked(rankings)
    if len(set(groups)) < FOLDS:
        return Lexicon(0.0, {}), _alike(Lexicon(0.0, {}), rankings)
    found = {}
    for penalty in PENALTIES:
        folds = [
            _fit_orders([item for item, group in zip(rankings, groups, strict=True) if group % FOLDS != fold], penalty)
            for fold in range(FOLDS)
        ]
        bases = _scored([folds[group % FOLDS] for group in groups], rankings)
        found[penalty] = (surprise(rankings, bases), bases)
    best = min(found, key=lambda penalty: found[penalty][0])
    return _fit_orders(rankings, best), found[best][1]


def _start(rankings: Sequence[Ranking], bases: Bases) -> float:
    """Return what brings the bases of rated responses to their mean rating; 0 where none is rated.

    A logit stays a point: it is the unit in which the model learns from orders, which are most of what there is.
    """
    known = [(base, ranking.ratings) for ranking, base in zip(rankings, bases, strict=True) if ranking.ratings]
    missing = [rating - value for base, ratings in known for value, rating in zip(base, ratings, strict=True)]
    return round(math.fsum(missing) / len(missing), 6) if missing else 0.0


def _fit_orders(rankings: Sequence[Ranking], penalty: float) -> Lexicon:
    pairs = [(ranking.texts[i], ranking.texts[j]) for ranking in rankings for i, j, _ in ranking.pairs]
    return Lexicon.fit_orders(pairs, penalty=penalty)


def surprise(rankings: Sequence[Ranking], bases: Bases) -> float:
    """Return the mean Bradley–Terry loss of people's pairs, in nats; 0 where they ordered none."""
    distances = [base[i] - base[j] for ranking, base in zip(rankings, bases, strict=True) for i, j, _ in ranking.pairs]
    return math.fsum(np.logaddexp(0, -np.array(distances)).tolist()) / max(len(distances), 1)


def _alike(lexicon: Lexicon, rankings: Sequence[Ranking]) -> Bases:
    return _scored([lexicon] * len(rankings), rankings)


def _scored(lexicons: Sequence[Lexicon], rankings: Sequence[Ranking]) -> Bases:
    return [lexicon.score(ranking.texts) for lexicon, ranking in zip(lexicons, rankings, strict=True)]
