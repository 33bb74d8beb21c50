"""Krippendorff's alpha: how far raters agree beyond what chance would bring about, from judgements grouped by unit.

Klaus Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), whose worked example a test repeats. A unit is
what several people judged; who judged which of them does not matter, and a unit with one judgement says nothing. 1 is
perfect agreement, 0 what chance gives, below 0 is disagreement; his book asks for 0.8, and for 0.667 at least where
conclusions are tentative. The package `krippendorff` does the same under the GPL; here, units come as sums.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
ROUNDING = 1e-12  # of sums of squares, relative: far more than float64 loses, far less than people differ by


def interval(counts: npt.ArrayLike, sums: npt.ArrayLike, squares: npt.ArrayLike) -> float | None:
    """Return alpha for numbers on a scale, from each unit's count of values, their sum and the sum of their squares.

    Each shape (units,). None where no unit has two values, or all values are the same.
    """
    n, total, square = (np.asarray(values, dtype=np.float64) for values in (counts, sums, squares))
    pairable = n > 1
    n, total, square = n[pairable], total[pairable], square[pairable]
    values = n.sum()
    # The sum of (a - b)² over all ordered pairs of n values is 2 (n Σa² - (Σa)²), or what rounding leaves of 0.
    most = values * square.sum()
    differences = most - total.sum() ** 2
    if differences <= ROUNDING * most:
        return None
    expected = 2 * differences / (values - 1)
    return float(1 - (2 * (n * square - total**2) / (n - 1)).sum() / expected)


def ordinal(counts: npt.ArrayLike) -> float | None:
    """Return alpha for ordered categories, from how often each unit was put into each; shape (units, categories).

    None where no unit has two values, or all values are in one category.
    """
    table = np.asarray(counts, dtype=np.float64)
    table = table[table.sum(axis=1) > 1]
    frequencies = table.sum(axis=0)
    n = frequencies.sum()
    distance = _ordinal_distance(frequencies)
    expected = (np.outer(frequencies, frequencies) * distance).sum() / (n - 1) if n else 0.0
    if expected <= 0:
        return None
    # Coincidences: each unit's ordered pairs of values, weighed so that each value counts once.
    coincidences = (table / (table.sum(axis=1, keepdims=True) - 1)).T @ table  # the diagonal's distance is 0
    return float(1 - (coincidences * distance).sum() / expected)


def _ordinal_distance(frequencies: Floats) -> Floats:
    """Return the squared distance of each two categories: the values between them, their own counted half."""
    middle = np.cumsum(frequencies) - frequencies / 2
    distance: Floats = np.subtract.outer(middle, middle) ** 2
    return distance


def sums_by(keys: npt.NDArray[Any], *values: npt.ArrayLike) -> tuple[npt.NDArray[Any], ...]:
    """Return the different keys and, for each column of values, its sum over each key's rows."""
    unique, inverse = np.unique(keys, return_inverse=True)
    return (unique, *(np.bincount(inverse, weights=np.asarray(each, np.float64), minlength=len(unique))
                      for each in values))  # fmt: skip
