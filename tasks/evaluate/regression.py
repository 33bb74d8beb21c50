"""Regression: the numbers that a model with a regression head gives to held-out texts."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks.common.evaluation.labels import number_metrics
from tasks.common.evaluation.scorecard import choose_conversations
from tasks.evaluate.classification import label_of
from tasks.evaluate.evaluation import Evaluation, Facts, Mean, Result, Row, answer_row, means_of
from tasks.evaluate.heldout_loss import NOTHING_HELD_OUT

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

KIND = "regressed"  # of the rows
MEANS = {"mean_absolute_error": Mean(KIND, "absolute_error")}
OTHERS = ("rmse", "mean_baseline_rmse", "pearson", "spearman")


class Regression(Evaluation):
    """Errors and correlations on held-out texts with numbers."""

    KIND: ClassVar[str] = "regression"
    APPLIES_TO: ClassVar[str] = "Models that give a number, and held-out conversations that end in one."
    MODELS: ClassVar[tuple[str, ...]] = ("classifier",)
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions",)

    kind: Literal["regression"] = Field(description="Kind of evaluation")
    texts: int = Field(default=1000, description="Maximum number of held-out texts", ge=1)

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the mean absolute error, the root mean squared error with that of the mean, and correlations."""
        return (*MEANS, *OTHERS) if facts.instructions and facts.numeric is not False else ()

    def measure(self, subject: "Subject") -> Result:
        """Compare the model's numbers with those of the held-out texts."""
        classifier = subject.classifier
        if classifier.labels is not None:
            return Result(absent="the model gives labels and no number")
        table = [row for row in subject.table if row["messages"][-1]["role"] == "assistant"]
        chosen = choose_conversations(table, "heldout", self.texts)
        numeric = [row for row in chosen if number_of(row) is not None]
        encoded = [classifier.encode(row["messages"][:-1]) for row in numeric]
        fitting = [at for at, ids in enumerate(encoded) if len(ids) <= classifier.context]
        details = {
            "texts": len(fitting), "no_number": len(chosen) - len(numeric), "too_long": len(numeric) - len(fitting),
        }  # fmt: skip
        if not fitting:
            absent = "no held-out text has a number and fits the model's context" if chosen else NOTHING_HELD_OUT
            return Result(absent=absent, details=details)
        used = [numeric[at] for at in fitting]
        predictions = classifier.logits([encoded[at] for at in fitting])[:, 0].astype(np.float64)
        rows = [_row(row, prediction) for row, prediction in zip(used, predictions.tolist(), strict=True)]
        trained = [number for row in table if row["split"] == "train" and (number := number_of(row)) is not None]
        metrics = number_metrics(predictions, np.array([number_of(row) for row in used]), float(np.mean(trained or 0)))
        subject.mark_seen_text(rows, [row["messages"][:-1] for row in used])
        figures, means = means_of(rows, MEANS)
        return Result(figures | {name: metrics[name] for name in OTHERS}, rows, means=means, details=details)


def number_of(row: Row) -> float | None:
    """Return the number that a row's last answer is; None if it is not a finite number."""
    try:
        number = float(label_of(row))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _row(row: Row, prediction: float) -> Row:
    own = {"reference": label_of(row), "extracted": None}
    error = abs(prediction - float(label_of(row)))
    return {**answer_row(row, KIND, f"{prediction:.4f}"), **own, "absolute_error": round(error, 6)}
