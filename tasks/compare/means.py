"""Intervals and paired differences of figures that are means or rates over answer rows, and their parts by seen text.

An evaluation says in its record how such a figure follows from the rows (`Mean` in `tasks/evaluate/evaluation.py`).
Rows about one entity are correlated, so entities are the clusters; a row without an entity is a cluster of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.compare import bootstrap, wilson

Row = Mapping[str, Any]
Spec = Mapping[str, Any]
Cells = dict[tuple[str, str], tuple[float, float]]  # (cluster, row id): numerator, denominator
SEEN_TEXT_GROUPS = ("seen", "nearly", "unseen")


def select(rows: Sequence[Row], spec: Spec, evaluation: str) -> list[Row]:
    """Return the rows that a figure follows from."""
    return [
        row for row in rows
        if row["kind"] == spec["rows"] and row["evaluation"] == evaluation
        and spec["split"] in (None, row["split"]) and row[spec["column"]] is not None
    ]  # fmt: skip


def interval(rows: Sequence[Row], spec: Spec, resamples: int, seed: int) -> list[float] | None:
    """Return a figure's 95 % interval: Wilson's for a rate, else a bootstrap interval; None without rows."""
    clusters: dict[str, list[float]] = {}
    for (cluster, _), cell in _cells(rows, spec).items():
        sums = clusters.setdefault(cluster, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + cell[0], sums[1] + cell[1]
    if not clusters:
        return None
    sums_of_clusters = np.array([sums for _, sums in sorted(clusters.items())], dtype=float)
    if spec["rate"]:
        return wilson.interval(sums_of_clusters)
    return bootstrap.interval(sums_of_clusters, resamples, seed, spec["scale"])


def paired_difference(
    before: Sequence[Row], after: Sequence[Row], spec: Spec, resamples: int, seed: int
) -> dict[str, Any]:
    """Return the difference of a figure between two models on the same items, with its paired 95 % interval.

    Empty if they share no item.
    """
    old, new = _cells(before, spec), _cells(after, spec)
    clusters: dict[str, list[float]] = {}
    for item in sorted(old.keys() & new.keys()):
        sums = clusters.setdefault(item[0], [0.0] * 4)
        for column, value in enumerate((*old[item], *new[item])):
            sums[column] += value
    if not clusters:
        return {}
    table = np.array([sums for _, sums in sorted(clusters.items())], dtype=float)  # (clusters, 4)
    total = table.sum(axis=0)
    change = spec["scale"] * (total[2] / total[3] - total[0] / total[1])
    return {
        "change": round(float(change), 4),
        "interval": bootstrap.difference_interval(table, resamples, seed, spec["scale"]),
    }


def by_seen_text(rows: Sequence[Row], spec: Spec) -> dict[str, dict[str, Any]]:
    """Return a figure and its number of items for items that are seen, nearly seen and unseen; empty if not known."""
    found = {}
    for group in SEEN_TEXT_GROUPS:
        cells = _cells([row for row in rows if row["seen_text"] == group], spec).values()
        divisor = sum(below for _, below in cells)
        if divisor:
            value = spec["scale"] * sum(above for above, _ in cells) / divisor
            found[group] = {"value": round(value, 4), "items": len(cells)}
    return found


def _cells(rows: Sequence[Row], spec: Spec) -> Cells:
    return {
        (row["entity"] or row["id"], row["id"]): (
            float(row[spec["column"]]),
            float(row[spec["by"]] if spec["by"] else 1),
        )
        for row in rows
    }
