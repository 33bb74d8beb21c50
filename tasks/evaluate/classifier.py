"""Binary text classifier: logistic regression on tf-idf features, with balanced class weights.

Without balancing, a text of only unknown words would be assigned to the larger class. That would dominate the results
on texts from another domain than the training texts.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.common.reward.lexicon import terms

MIN_TEXTS_PER_TERM = 2  # a term in fewer training texts is not in the vocabulary
L2_PENALTY = 1.0  # factor of half the sum of squared weights, added to the sum of losses
MAX_ITERATIONS = 500
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier. `bias` is the log-odds of a text without a known term."""

    vocabulary: dict[str, int]
    idf: Floats  # (V,) inverse document frequencies
    weights: Floats  # (V,) log-odds
    bias: float

    @classmethod
    def fit(cls, texts: Sequence[str], positive: Sequence[bool]) -> "Classifier":
        """Fit with L-BFGS; both classes must have texts."""
        from scipy.optimize import minimize

        counts = Counter(term for text in texts for term in terms(text))
        vocabulary_terms = sorted(term for term, count in counts.items() if count >= MIN_TEXTS_PER_TERM)
        idf = np.array([math.log((1 + len(texts)) / (1 + counts[term])) + 1 for term in vocabulary_terms])
        vocabulary = {term: column for column, term in enumerate(vocabulary_terms)}
        rows = _tfidf_matrix(texts, vocabulary, idf)  # (N, V)
        signs = np.where(positive, 1.0, -1.0)
        positive_share = float(np.mean(positive))
        class_weights = np.where(positive, 0.5 / positive_share, 0.5 / (1 - positive_share))

        def loss(parameters: Floats) -> tuple[float, Floats]:
            weights, margins = parameters[:-1], signs * (rows @ parameters[:-1] + parameters[-1])
            value = float(class_weights @ np.logaddexp(0, -margins)) + L2_PENALTY / 2 * float(weights @ weights)
            margin_gradients = -class_weights * signs * _sigmoid(-margins)
            return value, np.append(rows.T @ margin_gradients + L2_PENALTY * weights, margin_gradients.sum())

        result: Any = minimize(
            loss, np.zeros(len(vocabulary_terms) + 1), jac=True, method="L-BFGS-B", options={"maxiter": MAX_ITERATIONS}
        )
        parameters = np.round(result.x, 6)
        return cls(vocabulary, idf, parameters[:-1], float(parameters[-1]))

    def probability(self, texts: Sequence[str]) -> Floats:
        """Return the probability of the positive class for each text, assuming equal class priors; shape (N,)."""
        return _sigmoid(_tfidf_matrix(texts, self.vocabulary, self.idf) @ self.weights + self.bias)


def auc(scores: Floats, positive: Floats) -> float:
    """Return the area under the ROC curve: how often a positive text scores above a negative one, a tie counting half.

    Computed from rank sums (Mann & Whitney 1947).
    """
    from scipy.stats import rankdata

    hits = int(positive.sum())
    ranks = float(rankdata(scores)[positive].sum())
    return (ranks - hits * (hits + 1) / 2) / (hits * (len(positive) - hits))


def _tfidf_matrix(texts: Sequence[str], vocabulary: dict[str, int], idf: Floats) -> Any:
    """Return the tf-idf features as a sparse matrix (N, V) whose rows have L2 norm 1."""
    from scipy.sparse import csr_matrix

    row_starts, column_indices, values = [0], [], []
    for text in texts:
        known = [vocabulary[term] for term in terms(text) if term in vocabulary]
        norm = math.sqrt(sum(idf[column] ** 2 for column in known))
        column_indices += known
        values += [idf[column] / norm for column in known]
        row_starts.append(len(column_indices))
    return csr_matrix(
        (np.array(values), np.array(column_indices, int), np.array(row_starts)), shape=(len(texts), len(vocabulary))
    )


def _sigmoid(values: Floats) -> Floats:
    from scipy.special import expit

    result: Floats = expit(values)
    return result
