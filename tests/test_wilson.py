"""Intervals of shares: Wilson's on single cases, honest near the ends, and by clusters where cases go together."""

import numpy as np
import numpy.typing as npt
import pytest

from tasks.common.evaluation import bootstrap, wilson

Sums = npt.NDArray[np.float64]


def clusters(counted: npt.ArrayLike, cases: npt.ArrayLike = 1) -> Sums:
    """Return what `interval` reads."""
    given = np.asarray(counted, float)
    return np.stack([given, np.broadcast_to(np.asarray(cases, float), given.shape)], axis=1)


@pytest.mark.parametrize("number", [1, 2, 20, 113])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
def test_single_cases_have_wilsons_interval(number: int, share: float) -> None:
    """As SciPy works it out for a binomial."""
    from scipy.stats import binomtest

    right = round(share * number)
    low, high = binomtest(right, number).proportion_ci(0.95, method="wilson")
    assert wilson.interval(clusters([1.0] * right + [0.0] * (number - right))) == pytest.approx([low, high], abs=6e-5)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("together", [False, True])
def test_ninety_five_of_a_hundred_intervals_hold_the_share(share: float, together: bool) -> None:
    """Thirty clusters of one case, or of four that are always alike, 400 draws; a bootstrap's hold it less often."""
    draws, size = np.random.default_rng(1), 4 if together else 1
    held = {"ours": 0, "bootstrap": 0}
    for seed in range(400):
        sums = clusters(size * (draws.random(30) < share), size)
        for name, (low, high) in (("ours", wilson.interval(sums)), ("bootstrap", bootstrap.interval(sums, 200, seed))):
            held[name] += low <= share <= high
    assert held["ours"] >= 0.92 * 400  # three standard errors below 95 %
    assert share < 0.95 or held["bootstrap"] < 0.85 * 400


def test_the_effective_number_comes_from_the_variance_between_clusters() -> None:
    """As a bootstrap of many resamples has it, for clusters of unequal size with something in common."""
    draws = np.random.default_rng(2)
    cases = draws.integers(1, 9, 200)
    sums = clusters(draws.binomial(cases, draws.beta(2, 2, 200)), cases)
    share, variance = sums[:, 0].sum() / sums[:, 1].sum(), bootstrap.resampled(sums, 20_000, 1).var()
    assert wilson.effective(sums) == pytest.approx(share * (1 - share) / variance, rel=0.05)
    assert 200 < wilson.effective(sums) < cases.sum()


def test_the_effective_number_is_at_most_that_of_cases_and_of_clusters_where_these_are_alike() -> None:
    """Clusters of one share say nothing of how their cases go together: each counts once, large ones alone count."""
    assert wilson.effective(clusters([1, 2, 1, 2], [2, 3, 2, 3])) == 10
    assert wilson.effective(clusters([2.0] * 7, 4)) == 7
    assert wilson.effective(clusters([1, 2], [3, 6])) == pytest.approx(81 / 45)
    assert wilson.effective(clusters([50, 1], [50, 1])) == pytest.approx(1.04, abs=0.01)
    assert wilson.effective(clusters([25], [50])) == 1
