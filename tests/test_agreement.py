"""Krippendorff's alpha against his worked example, and against loops over all pairs of values."""

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from tasks.validate import agreement

Units = list[list[float]]
# Four observers, twelve units: example C of Krippendorff, Computing Krippendorff's Alpha-Reliability (2011). 0: none.
OBSERVED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
EXAMPLE: Units = [[float(value) for value in unit if value] for unit in zip(*OBSERVED, strict=True)]


def interval_alpha(units: Units) -> float | None:
    sums = [(len(unit), math.fsum(unit), math.fsum(value**2 for value in unit)) for unit in units]
    return agreement.interval_alpha(*zip(*sums, strict=True))


def ordinal_alpha(units: Units) -> float | None:
    ranks = sorted({value for unit in units for value in unit})
    return agreement.ordinal_alpha([[unit.count(rank) for rank in ranks] for unit in units])


def alpha_by_definition(units: Units, level: str) -> float:
    """Return 1 - observed / expected disagreement, both as means over ordered pairs of values."""
    pairable = [unit for unit in units if len(unit) > 1]
    values = [value for unit in pairable for value in unit]

    def distance(one: float, other: float) -> float:
        if level == "interval":
            return (one - other) ** 2
        low, high = sorted((one, other))
        between = sum(low <= value <= high for value in values)
        return 0.0 if one == other else (between - (values.count(one) + values.count(other)) / 2) ** 2

    observed = sum(distance(*pair) / (len(unit) - 1) for unit in pairable for pair in permutations(unit, 2))
    expected = sum(distance(*pair) for pair in permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


def test_alpha_worked_example_matches_publication() -> None:
    assert round(ordinal_alpha(EXAMPLE) or 0, 3) == 0.815
    assert round(interval_alpha(EXAMPLE) or 0, 3) == 0.849


@pytest.mark.parametrize(("level", "alpha"), [("interval", interval_alpha), ("ordinal", ordinal_alpha)])
def test_random_ratings_give_the_alpha_of_the_definition(level: str, alpha: Any) -> None:
    generator = np.random.default_rng(7)
    for _ in range(20):
        units = [list(generator.integers(-2, 3, generator.integers(0, 5)).astype(float)) for _ in range(12)]
        assert alpha(units) == pytest.approx(alpha_by_definition(units, level))


@pytest.mark.parametrize("alpha", [interval_alpha, ordinal_alpha])
def test_equal_values_in_each_unit_give_1_and_equal_values_everywhere_give_none(alpha: Any) -> None:
    assert math.isclose(alpha([[1.0, 1.0], [3.0, 3.0, 3.0], [2.0]]), 1)
    assert alpha([[2.0, 2.0], [2.0, 2.0]]) is None
    assert alpha([[1.0], [2.0]]) is None


@pytest.mark.parametrize("value", [0.1, 0.7, -3.3, 1 / 3])
def test_one_value_everywhere_gives_none_despite_rounding(value: float) -> None:
    """The smallest difference of ratings gives a value."""
    units = [[value] * count for count in (2, 3, 5, 7, 20, 97)]
    assert interval_alpha(units) is None
    assert interval_alpha([*units, [value, value + 0.01]]) == pytest.approx(0, abs=0.1)
