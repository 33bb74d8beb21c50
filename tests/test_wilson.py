"""Wilson intervals: of independent cases, near 0 and 1, and of clustered cases."""

import numpy as np
import numpy.typing as npt
import pytest

from tasks.compare import bootstrap, wilson

Sums = npt.NDArray[np.float64]


def clusters(counts: npt.ArrayLike, cases: npt.ArrayLike = 1) -> Sums:
    """Return the input of `interval`."""
    successes = np.asarray(counts, float)
    return np.stack([successes, np.broadcast_to(np.asarray(cases, float), successes.shape)], axis=1)


@pytest.mark.parametrize("number", [1, 2, 20, 113])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
def test_single_cases_have_wilsons_interval(number: int, share: float) -> None:
    """Compared with SciPy's."""
    from scipy.stats import binomtest

    right = round(share * number)
    low, high = binomtest(right, number).proportion_ci(0.95, method="wilson")
    assert wilson.interval(clusters([1.0] * right + [0.0] * (number - right))) == pytest.approx([low, high], abs=6e-5)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("together", [False, True])
def test_coverage_is_95_percent(share: float, together: bool) -> None:
    """400 samples of thirty clusters, of one case or of four equal ones; bootstrap intervals have lower coverage."""
    draws, size = np.random.default_rng(1), 4 if together else 1
    covered = {"ours": 0, "bootstrap": 0}
    for seed in range(400):
        sums = clusters(size * (draws.random(30) < share), size)
        for name, (low, high) in (("ours", wilson.interval(sums)), ("bootstrap", bootstrap.interval(sums, 200, seed))):
            covered[name] += low <= share <= high
    assert covered["ours"] >= 0.92 * 400  # three standard errors below 95 %
    assert share < 0.95 or covered["bootstrap"] < 0.85 * 400


def test_effective_sample_size_follows_from_variance_between_clusters() -> None:
    """Compared with a bootstrap of many resamples, for correlated clusters of unequal size."""
    draws = np.random.default_rng(2)
    cases = draws.integers(1, 9, 200)
    sums = clusters(draws.binomial(cases, draws.beta(2, 2, 200)), cases)
    share, variance = sums[:, 0].sum() / sums[:, 1].sum(), bootstrap.resample_ratios(sums, 20_000, 1).var()
    assert wilson.effective_sample_size(sums) == pytest.approx(share * (1 - share) / variance, rel=0.05)
    assert 200 < wilson.effective_sample_size(sums) < cases.sum()


def test_effective_sample_size_is_at_most_cases_and_equal_clusters() -> None:
    """If all clusters have the same proportion, each counts as one case, weighted by its size."""
    assert wilson.effective_sample_size(clusters([1, 2, 1, 2], [2, 3, 2, 3])) == 10
    assert wilson.effective_sample_size(clusters([2.0] * 7, 4)) == 7
    assert wilson.effective_sample_size(clusters([1, 2], [3, 6])) == pytest.approx(81 / 45)
    assert wilson.effective_sample_size(clusters([50, 1], [50, 1])) == pytest.approx(1.04, abs=0.01)
    assert wilson.effective_sample_size(clusters([25], [50])) == 1
