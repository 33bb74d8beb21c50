"""Bootstrap intervals (Efron & Tibshirani 1993) of ratios of sums, resampling whole clusters."""

import numpy as np
import numpy.typing as npt

from tasks.common.random_streams import Stream, generator

Floats = npt.NDArray[np.float64]


def resample_ratios(sums: Floats, resamples: int, seed: int) -> Floats:
    """Return the ratio in each resample; `sums` (N, 2) holds each cluster's numerator and denominator."""
    chosen = generator(seed, Stream.BOOTSTRAP).integers(len(sums), size=(resamples, len(sums)))
    totals = sums[chosen].sum(axis=1)  # (resamples, 2)
    result: Floats = totals[:, 0] / np.maximum(totals[:, 1], 1)
    return result


def interval(sums: Floats, resamples: int, seed: int) -> list[float]:
    """Return the 95 % percentile interval of the ratio."""
    ratios = resample_ratios(sums, resamples, seed)
    return [round(float(value), 4) for value in np.percentile(ratios, [2.5, 97.5])]
