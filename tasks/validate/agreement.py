"""Krippendorff's alpha: agreement of raters beyond chance, computed from judgements grouped by unit.

Source: Klaus Krippendorff, Computing Krippendorff's Alpha-Reliability (2011); a test repeats its worked example. A unit
is an item that several people judged. Who judged which unit does not matter, and a unit with one judgement does not
count. 1 is perfect agreement, 0 is chance, below 0 is systematic disagreement. Krippendorff requires 0.8, and 0.667 for
tentative conclusions. The package `krippendorff` computes the same but is under the GPL; here, units are given as sums.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
ROUNDING_TOLERANCE = 1e-12  # relative, of sums of squares: above float64 rounding, below real differences of ratings


def interval_alpha(counts: npt.ArrayLike, sums: npt.ArrayLike, squares: npt.ArrayLike) -> float | None:
    """Return alpha on an interval scale, from the count of values of each unit, their sum and their sum of squares.

    Each array has shape (units,). None if no unit has two values, or all values are equal.
    """
    n, total, square = (np.asarray(values, dtype=np.float64) for values in (counts, sums, squares))
    pairable = n > 1
    n, total, square = n[pairable], total[pairable], square[pairable]
    values = n.sum()
    # The sum of (a - b)² over all ordered pairs of n values is 2 (n Σa² - (Σa)²).
    total_squares = values * square.sum()
    differences = total_squares - total.sum() ** 2
    if differences <= ROUNDING_TOLERANCE * total_squares:
        return None
    expected = 2 * differences / (values - 1)
    return float(1 - (2 * (n * square - total**2) / (n - 1)).sum() / expected)


def ordinal_alpha(counts: npt.ArrayLike) -> float | None:
    """Return alpha on an ordinal scale, from the counts of each category for each unit, shape (units, categories).

    None if no unit has two values, or all values are in one category.
    """
    table = np.asarray(counts, dtype=np.float64)
    table = table[table.sum(axis=1) > 1]
    frequencies = table.sum(axis=0)
    n = frequencies.sum()
    distance = _ordinal_distance(frequencies)
    expected = (np.outer(frequencies, frequencies) * distance).sum() / (n - 1) if n else 0.0
    if expected <= 0:
        return None
    # Coincidences: the ordered pairs of values of each unit, weighted so that each value counts once.
    coincidences = (table / (table.sum(axis=1, keepdims=True) - 1)).T @ table  # the diagonal's distance is 0
    return float(1 - (coincidences * distance).sum() / expected)


def _ordinal_distance(frequencies: Floats) -> Floats:
    """Return the squared ordinal distances of all pairs of categories, shape (categories, categories)."""
    middle = np.cumsum(frequencies) - frequencies / 2
    distance: Floats = np.subtract.outer(middle, middle) ** 2
    return distance


def sum_by_key(keys: npt.NDArray[Any], *values: npt.ArrayLike) -> tuple[npt.NDArray[Any], ...]:
    """Return the unique keys and, for each array of values, its sums over the rows of each key."""
    unique, inverse = np.unique(keys, return_inverse=True)
    return (unique, *(np.bincount(inverse, weights=np.asarray(each, np.float64), minlength=len(unique))
                      for each in values))  # fmt: skip
