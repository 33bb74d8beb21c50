"""Ratings of whole words, by ridge regression: what the reward model starts from, and the baseline that it must beat.

A text's rating is the mean rating plus the sum over its different words (and, if asked for, its pairs of neighbouring
words). People's ratings of single sentences are mostly told by their words, and words are few enough to be solved for.
Where people only said which of two texts is better, the same words are rated by Bradley and Terry's model of that.
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

from tasks.common.stage import write_json

RIDGE = 9.0  # penalty on a word's squared rating, in squared rating points
EXACT = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-7}  # of words' ratings from orders: below what is written of them

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Lexicon:
    """A mean rating and what each known word adds to it, in rating points; an unknown word adds nothing."""

    mean: float
    words: dict[str, float]
    bigrams: bool = False

    @classmethod
    def fit_orders(cls, pairs: Sequence[tuple[str, str]], *, penalty: float, bigrams: bool = False) -> "Lexicon":
        """Return the words' ratings w that make it likely that people preferred each pair's first text to its second.

        They minimise Σ log(1 + exp(−(x − y) · w)) + penalty / 2 · w · w over the pairs (Bradley & Terry 1952), x and y
        being which words a text holds; the sum is strictly convex, so that there is one such w. Its unit is the logit.
        Words that the two texts of a pair share say nothing there, and the mean is 0.
        """
        from scipy.optimize import minimize
        from scipy.special import expit

        places = {text: place for place, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        present, columns = _table(list(places), bigrams)
        if present is None:
            return cls(0.0, {}, bigrams)
        better, worse = ([places[pair[side]] for pair in pairs] for side in (0, 1))
        differences = present[better] - present[worse]  # (pairs, words)

        def loss(weights: Numbers) -> tuple[float, Numbers]:
            found = differences @ weights
            slope = penalty * weights - differences.T @ expit(-found)
            return float(np.logaddexp(0, -found).sum() + penalty / 2 * weights @ weights), slope

        start = np.zeros(len(columns))
        weights = minimize(loss, start, jac=True, method="L-BFGS-B", options=EXACT).x
        return cls(0.0, dict(zip(columns, np.round(weights, 6).tolist(), strict=True)), bigrams)

    @classmethod
    def fit(
        cls, texts: Sequence[str], ratings: Sequence[float], *, words: bool = True, bigrams: bool = False
    ) -> "Lexicon":
        """Return the ridge regression of ratings on the texts' words, or their mean alone; without texts it is 0."""
        from scipy.sparse.linalg import lsqr

        mean = round(sum(ratings) / len(ratings), 6) if ratings else 0.0
        present, columns = _table(texts if words else [], bigrams)
        if present is None:
            return cls(mean, {}, bigrams)
        weights = lsqr(present, np.array(ratings) - mean, damp=RIDGE**0.5, iter_lim=200)[0]
        return cls(mean, dict(zip(columns, np.round(weights, 6).tolist(), strict=True)), bigrams)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the rating of each text."""
        return [self.mean + sum(self.words.get(term, 0.0) for term in terms(text, self.bigrams)) for text in texts]

    def save(self, path: Path) -> None:
        """Write the lexicon as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Lexicon":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text("utf-8")))


def _table(texts: Sequence[str], bigrams: bool) -> tuple[Any, list[str]]:
    """Return which text holds which term, a sparse matrix of ones (texts, terms), and the terms; None without any."""
    from scipy.sparse import csr_matrix

    rows = [terms(text, bigrams) for text in texts]
    columns = {term: place for place, term in enumerate(dict.fromkeys(term for row in rows for term in row))}
    cells = [(number, columns[term]) for number, row in enumerate(rows) for term in row]
    if not cells:
        return None, []
    table = csr_matrix((np.ones(len(cells)), np.array(cells).T), shape=(len(rows), len(columns)))
    return table, list(columns)


def terms(text: str, bigrams: bool = False) -> list[str]:
    """Return a text's different words and marks, lower case, in their order, then its different pairs of them."""
    words = re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower())
    pairs = (f"{a} {b}" for a, b in pairwise(words)) if bigrams else ()
    return list(dict.fromkeys([*words, *pairs]))
