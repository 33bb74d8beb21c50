"""Bootstrap intervals (Efron & Tibshirani 1993) of ratios of sums, by drawing what goes together as a whole."""

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


def resampled(sums: Numbers, resamples: int, seed: int) -> Numbers:
    """Return the ratio in each resample. `sums` (N, 2) holds of each whole what is counted and out of how many."""
    chosen = np.random.default_rng([seed, 5]).integers(len(sums), size=(resamples, len(sums)))
    totals = sums[chosen].sum(axis=1)  # (resamples, 2)
    result: Numbers = totals[:, 0] / np.maximum(totals[:, 1], 1)
    return result


def interval(sums: Numbers, resamples: int, seed: int) -> list[float]:
    """Return the 95 % percentile interval of the ratio."""
    ratios = resampled(sums, resamples, seed)
    return [round(float(value), 4) for value in np.percentile(ratios, [2.5, 97.5])]
