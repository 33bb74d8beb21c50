"""Ratings of whole words, by ridge regression: what the reward model starts from, and the baseline that it must beat.

A text's rating is the mean rating plus the sum over its different words (and, if asked for, its pairs of neighbouring
words). People's ratings of single sentences are mostly told by their words, and words are few enough to be solved for.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from tasks.common.stage import write_json

RIDGE = 9.0  # penalty on a word's squared rating, in squared rating points


@dataclass(frozen=True)
class Lexicon:
    """A mean rating and what each known word adds to it, in rating points; an unknown word adds nothing."""

    mean: float
    words: dict[str, float]
    bigrams: bool = False

    @classmethod
    def fit(
        cls, texts: Sequence[str], ratings: Sequence[float], *, words: bool = True, bigrams: bool = False
    ) -> "Lexicon":
        """Return the ridge regression of ratings on the texts' words, or their mean alone; without texts it is 0."""
        from scipy.sparse import csr_matrix
        from scipy.sparse.linalg import lsqr

        mean = round(sum(ratings) / len(ratings), 6) if ratings else 0.0
        rows = [terms(text, bigrams) for text in texts] if words else []
        columns = {term: place for place, term in enumerate(dict.fromkeys(term for row in rows for term in row))}
        if not columns:
            return cls(mean, {}, bigrams)
        cells = [(number, columns[term]) for number, row in enumerate(rows) for term in row]
        present = csr_matrix((np.ones(len(cells)), np.array(cells).T), shape=(len(rows), len(columns)))
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


def terms(text: str, bigrams: bool = False) -> list[str]:
    """Return a text's different words and marks, lower case, in their order, then its different pairs of them."""
    words = re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower())
    pairs = (f"{a} {b}" for a, b in pairwise(words)) if bigrams else ()
    return list(dict.fromkeys([*words, *pairs]))
