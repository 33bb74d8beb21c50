"""The mean of several people's scores of one response, independent of their order."""

from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache


def mean_score(scores: Sequence[float]) -> float:
    """Return the mean of decimal scores, computed exactly and rounded once.

    A float sum depends on the order of its terms: 0.1, 0.2 and 0.3 would beat 0.3, 0.2 and 0.1. Tables hold scores as
    float32, which distinguishes decimals of up to 7 digits.
    """
    return float(sum(map(_decimal, scores), Decimal(0)) / len(scores))


@lru_cache(maxsize=4096)  # raters use few distinct scores
def _decimal(score: float) -> Decimal:
    return Decimal(f"{score:.7g}")
