"""A classifier of texts in two classes by their words: logistic regression on tf-idf weights.

Both classes weigh alike in training, however many texts each has. Otherwise a text of words that were never seen would
be of the larger class, which decides everything where texts of another kind than the training's are judged.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.common.modelling.lexicon import terms

FEWEST = 2  # training texts with a word, for the word to count
PENALTY = 1.0  # on half the sum of squared weights, beside the sum of losses
ITERATIONS = 500
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Classifier:
    """The words that count, each with its rarity and its weight, and the log-odds of a text that has none of them."""

    columns: dict[str, int]
    rarity: Numbers  # (V,) inverse document frequencies
    weights: Numbers  # (V,) log-odds
    bias: float

    @classmethod
    def fit(cls, texts: Sequence[str], positive: Sequence[bool]) -> "Classifier":
        """Return the classifier that L-BFGS finds; both classes must have texts."""
        from scipy.optimize import minimize

        counts = Counter(term for text in texts for term in terms(text))
        kept = sorted(term for term, count in counts.items() if count >= FEWEST)
        rarity = np.array([math.log((1 + len(texts)) / (1 + counts[term])) + 1 for term in kept])
        columns = {term: place for place, term in enumerate(kept)}
        rows = _matrix(texts, columns, rarity)  # (N, V)
        signs = np.where(positive, 1.0, -1.0)
        share = float(np.mean(positive))
        balance = np.where(positive, 0.5 / share, 0.5 / (1 - share))

        def loss(parameters: Numbers) -> tuple[float, Numbers]:
            weights, margins = parameters[:-1], signs * (rows @ parameters[:-1] + parameters[-1])
            value = float(balance @ np.logaddexp(0, -margins)) + PENALTY / 2 * float(weights @ weights)
            slopes = -balance * signs * _sigmoid(-margins)
            return value, np.append(rows.T @ slopes + PENALTY * weights, slopes.sum())

        found: Any = minimize(
            loss, np.zeros(len(kept) + 1), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}
        )
        parameters = np.round(found.x, 6)
        return cls(columns, rarity, parameters[:-1], float(parameters[-1]))

    def probability(self, texts: Sequence[str]) -> Numbers:
        """Return how likely each text is of the positive class, in classes of equal size; shape (N,)."""
        return _sigmoid(_matrix(texts, self.columns, self.rarity) @ self.weights + self.bias)


def auc(scores: Numbers, positive: Numbers) -> float:
    """Return how often a positive text scores above another, ties counting half (Mann & Whitney 1947)."""
    from scipy.stats import rankdata

    hits = int(positive.sum())
    ranks = float(rankdata(scores)[positive].sum())
    return (ranks - hits * (hits + 1) / 2) / (hits * (len(positive) - hits))


def _matrix(texts: Sequence[str], columns: dict[str, int], rarity: Numbers) -> Any:
    """Return the texts' known words, each at its rarity, as rows of length 1 in a sparse matrix (N, V)."""
    from scipy.sparse import csr_matrix

    starts, places, values = [0], [], []
    for text in texts:
        known = [columns[term] for term in terms(text) if term in columns]
        norm = math.sqrt(sum(rarity[place] ** 2 for place in known))
        places += known
        values += [rarity[place] / norm for place in known]
        starts.append(len(places))
    return csr_matrix((np.array(values), np.array(places, int), np.array(starts)), shape=(len(texts), len(columns)))


def _sigmoid(values: Numbers) -> Numbers:
    from scipy.special import expit

    result: Numbers = expit(values)
    return result
