"""Metrics of predicted labels."""

from typing import Any

import numpy as np


def label_metrics(predictions: Any, targets: Any, labels: int, majority_label: float) -> dict[str, float]:
    """Return accuracy and macro F1, the mean over the labels that occur among targets or predictions."""
    counts = np.zeros((labels, labels))
    np.add.at(counts, (targets.astype(int), predictions), 1)  # (right, found)
    hits, total = counts.diagonal(), counts.sum(0) + counts.sum(1)
    return {
        "accuracy": round(float((predictions == targets).mean()), 4),
        "majority_label_accuracy": round(float((targets == majority_label).mean()), 4),
        "macro_f1": round(float((2 * hits[total > 0] / total[total > 0]).mean()), 4),
    }
