"""Wilson's interval (1927) of a proportion of clustered cases: an entity's questions, a prompt's replies.

A bootstrap interval has width zero if all cases are right or all are wrong, and is too narrow near these ends. Wilson's
is not. It uses the effective sample size for clustered surveys: p (1 - p) divided by the variance of the proportion
between clusters (Franco, Little, Louis & Slud 2019, "Comparative Study of Confidence Intervals for Proportions in
Complex Sample Surveys"). For clusters of one case it is the number of cases.
"""

import math

import numpy as np
import numpy.typing as npt

Z_95 = 1.959964  # the 97.5 % quantile of the standard normal distribution


def interval(sums: npt.NDArray[np.float64]) -> list[float]:
    """Return the 95 % interval of the proportion; `sums` (N, 2) holds each cluster's successes and cases."""
    share, cases = float(sums[:, 0].sum() / sums[:, 1].sum()), effective_sample_size(sums)
    center = share + Z_95**2 / (2 * cases)
    half_width = Z_95 * math.sqrt(share * (1 - share) / cases + Z_95**2 / (4 * cases**2))
    bounds = ((center + sign * half_width) / (1 + Z_95**2 / cases) for sign in (-1, 1))
    return [round(min(max(bound, 0.0), 1.0), 4) for bound in bounds]


def effective_sample_size(sums: npt.NDArray[np.float64]) -> float:
    """Return the number of independent cases with the same variance, at most the number of cases.

    The variance is that of a ratio of sums over clusters, by linearization. If all clusters have the same proportion,
    this variance is 0; then the size is (Σn)² / Σn² (Kish 1965), as if a cluster were one case.
    """
    counted, cases = sums.T
    total = float(cases.sum())
    if not np.ptp(counted / cases):
        return total**2 / float(cases @ cases)
    share = float(counted.sum()) / total
    variance = float(np.square(counted - share * cases).sum()) / total**2
    return min(share * (1 - share) / variance, total)
