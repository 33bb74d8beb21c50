"""Metrics of predicted labels and numbers."""

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


def number_metrics(predictions: Any, targets: Any, train_mean: float) -> dict[str, float | None]:
    """Return RMSE and correlations; a correlation is None if targets or predictions are constant."""
    from scipy.stats import pearsonr, spearmanr

    varied = len(targets) > 1 and np.ptp(predictions) > 0 and np.ptp(targets) > 0
    return {
        "rmse": round(float(np.sqrt(np.mean((predictions - targets) ** 2))), 4),
        "mean_baseline_rmse": round(float(np.sqrt(np.mean((train_mean - targets) ** 2))), 4),
        "pearson": round(float(pearsonr(predictions, targets).statistic), 4) if varied else None,
        "spearman": round(float(spearmanr(predictions, targets).statistic), 4) if varied else None,
    }
