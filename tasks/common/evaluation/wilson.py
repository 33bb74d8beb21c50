"""Wilson's interval (1927) of a share, of cases that come in clusters: an entity's questions, a prompt's replies.

A bootstrap interval is a point where all is right or all wrong, as every resample then is, and too narrow near there.
Wilson's is neither. Its number of cases is the effective one, by which surveys allow for clusters: p (1 - p) over the
variance of the share between clusters (compared with its rivals in Franco, Little, Louis & Slud 2019, "Comparative
Study of Confidence Intervals for Proportions in Complex Sample Surveys"). Of clusters of one case it is their number.
"""

import math

import numpy as np
import numpy.typing as npt

Z = 1.959964  # of the normal distribution lie 95 % within


def interval(sums: npt.NDArray[np.float64]) -> list[float]:
    """Return the 95 % interval of the share; `sums` (N, 2) holds of each cluster what is counted, and of how many."""
    share, number = float(sums[:, 0].sum() / sums[:, 1].sum()), effective(sums)
    middle = share + Z**2 / (2 * number)
    reach = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    ends = ((middle + way * reach) / (1 + Z**2 / number) for way in (-1, 1))
    return [round(min(max(end, 0.0), 1.0), 4) for end in ends]


def effective(sums: npt.NDArray[np.float64]) -> float:
    """Return how many independent cases would tell as much; never more than there are.

    The variance is that of a ratio of sums over clusters, by linearization, which a bootstrap of clusters comes near.
    Where all clusters have one share nothing is known of it, and a cluster counts as one case: (Σn)² / Σn² (Kish 1965)
    of them.
    """
    counted, cases = sums.T
    total = float(cases.sum())
    if not np.ptp(counted / cases):
        return total**2 / float(cases @ cases)
    share = float(counted.sum()) / total
    variance = float(np.square(counted - share * cases).sum()) / total**2
    return min(share * (1 - share) / variance, total)
