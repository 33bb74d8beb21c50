"""A bag-of-words reward model: the starting point of the neural reward model, and the baseline that it must beat.

A text's rating is the mean rating plus the sum of the weights of its distinct words (and optionally bigrams). Words
explain most of people's ratings of single sentences, and they are few enough for an exact solution. Ratings are fitted
by ridge regression, preferences between two texts by the Bradley–Terry model.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.common.harness.records import write_json

RIDGE_PENALTY = 9.0  # penalty on a word's squared rating, in squared rating points
LBFGS_OPTIONS = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-7}  # finer than the 6 decimals that are saved

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Lexicon:
    """A mean rating and the weight of each known word, in rating points; an unknown word weighs 0."""

    mean: float
    words: dict[str, float]
    bigrams: bool = False

    @classmethod
    def fit_preferences(cls, pairs: Sequence[tuple[str, str]], *, penalty: float, bigrams: bool = False) -> "Lexicon":
        """Fit word weights w to pairs of texts of which people preferred the first (Bradley & Terry 1952).

        The fit minimises Σ log(1 + exp(−(x − y) · w)) + penalty / 2 · w · w over the pairs, where x and y are the
        texts' 0/1 word vectors. The loss is strictly convex, so w is unique; its unit is the logit. Words that both
        texts of a pair contain cancel out, and the mean is 0.
        """
        from scipy.optimize import minimize
        from scipy.special import expit

        rows = {text: row for row, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        matrix, columns = _term_matrix(list(rows), bigrams)
        if matrix is None:
            return cls(0.0, {}, bigrams)
        better, worse = ([rows[pair[side]] for pair in pairs] for side in (0, 1))
        differences = matrix[better] - matrix[worse]  # (pairs, words)

        def loss(weights: Numbers) -> tuple[float, Numbers]:
            logits = differences @ weights
            gradient = penalty * weights - differences.T @ expit(-logits)
            return float(np.logaddexp(0, -logits).sum() + penalty / 2 * weights @ weights), gradient

        start = np.zeros(len(columns))
        weights = minimize(loss, start, jac=True, method="L-BFGS-B", options=LBFGS_OPTIONS).x
        return cls(0.0, dict(zip(columns, np.round(weights, 6).tolist(), strict=True)), bigrams)

    @classmethod
    def fit(
        cls, texts: Sequence[str], ratings: Sequence[float], *, words: bool = True, bigrams: bool = False
    ) -> "Lexicon":
        """Fit ratings by ridge regression on the texts' words or, without `words`, by their mean (0 without texts)."""
        from scipy.sparse.linalg import lsqr

        mean = round(sum(ratings) / len(ratings), 6) if ratings else 0.0
        matrix, columns = _term_matrix(texts if words else [], bigrams)
        if matrix is None:
            return cls(mean, {}, bigrams)
        weights = lsqr(matrix, np.array(ratings) - mean, damp=RIDGE_PENALTY**0.5, iter_lim=200)[0]
        return cls(mean, dict(zip(columns, np.round(weights, 6).tolist(), strict=True)), bigrams)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the rating of each text."""
        return [self.mean + sum(self.words.get(term, 0.0) for term in terms(text, self.bigrams)) for text in texts]

    def save(self, path: Path) -> None:
        """Write the lexicon as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Lexicon":
        """Load a lexicon that `save` wrote."""
        return cls(**json.loads(path.read_text("utf-8")))


def _term_matrix(texts: Sequence[str], bigrams: bool) -> tuple[Any, list[str]]:
    """Return the sparse 0/1 matrix (texts, terms) and the terms; None and [] if there are no terms."""
    from scipy.sparse import csr_matrix

    rows = [terms(text, bigrams) for text in texts]
    columns = {term: column for column, term in enumerate(dict.fromkeys(term for row in rows for term in row))}
    cells = [(number, columns[term]) for number, row in enumerate(rows) for term in row]
    if not cells:
        return None, []
    matrix = csr_matrix((np.ones(len(cells)), np.array(cells).T), shape=(len(rows), len(columns)))
    return matrix, list(columns)


def terms(text: str, bigrams: bool = False) -> list[str]:
    """Return a text's distinct lower-case words and punctuation in order, then (`bigrams`) its distinct bigrams."""
    words = re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower())
    pairs = (f"{a} {b}" for a, b in pairwise(words)) if bigrams else ()
    return list(dict.fromkeys([*words, *pairs]))
