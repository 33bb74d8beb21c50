"""Bootstrap intervals (Efron & Tibshirani 1993) of ratios of sums, resampling whole clusters."""

import numpy as np
import numpy.typing as npt

from tasks.common.random_streams import Stream, generator

Floats = npt.NDArray[np.float64]


def resample_sums(sums: Floats, resamples: int, seed: int) -> Floats:
    """Return the column sums of each resample of the clusters `sums` (N, columns): (resamples, columns)."""
    chosen = generator(seed, Stream.BOOTSTRAP).integers(len(sums), size=(resamples, len(sums)))
    totals: Floats = sums[chosen].sum(axis=1)
    return totals


def resample_ratios(sums: Floats, resamples: int, seed: int) -> Floats:
    """Return the ratio in each resample; `sums` (N, 2) holds each cluster's numerator and denominator."""
    totals = resample_sums(sums, resamples, seed)
    return _ratio(totals[:, 0], totals[:, 1])


def interval(sums: Floats, resamples: int, seed: int, scale: float = 1.0) -> list[float]:
    """Return the 95 % percentile interval of the ratio, times `scale`."""
    return _percentiles(scale * resample_ratios(sums, resamples, seed))


def difference_interval(sums: Floats, resamples: int, seed: int, scale: float = 1.0) -> list[float]:
    """Return the interval of the difference of two ratios over the same clusters, times `scale`.

    `sums` (N, 4) holds numerator and denominator of the first ratio, which is subtracted, then those of the second.
    """
    totals = resample_sums(sums, resamples, seed)
    return _percentiles(scale * (_ratio(totals[:, 2], totals[:, 3]) - _ratio(totals[:, 0], totals[:, 1])))


def _ratio(above: Floats, below: Floats) -> Floats:
    result: Floats = above / np.maximum(below, 1)
    return result


def _percentiles(values: Floats) -> list[float]:
    return [round(float(value), 4) for value in np.percentile(values, [2.5, 97.5])]
