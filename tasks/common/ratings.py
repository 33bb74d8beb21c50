"""The mean of several people's scores of one response: equal where people's numbers are, whatever their order."""

from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache


def mean_score(scores: Sequence[float]) -> float:
    """Return the mean of the decimals that people gave, rounded once.

    A sum of binary fractions depends on their order and number: 0.1, 0.2 and 0.3 would beat 0.3, 0.2 and 0.1. Tables
    hold scores as float32, which tells decimals of up to 7 digits apart.
    """
    return float(sum(map(_decimal, scores), Decimal(0)) / len(scores))


@lru_cache(maxsize=4096)  # people use few different numbers
def _decimal(score: float) -> Decimal:
    return Decimal(f"{score:.7g}")
