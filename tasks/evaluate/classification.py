"""Classification: the labels that a classifier gives to held-out texts, and the calibration of its probabilities."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from serving.names import probabilities
from tasks.common.evaluation.labels import label_metrics
from tasks.common.evaluation.scorecard import choose_conversations
from tasks.evaluate.evaluation import Evaluation, Facts, Mean, Result, Row, Rows, answer_row, means_of
from tasks.evaluate.heldout_loss import NOTHING_HELD_OUT, expected_calibration_error

if TYPE_CHECKING:
    from tasks.evaluate.classifiers_under_test import Classifier
    from tasks.evaluate.subject import Subject

KIND = "classified"  # of the rows
MEANS = {"accuracy": Mean(KIND, "correct", rate=True)}
OTHERS = ("macro_f1", "majority_label_accuracy", "label_calibration_error")


class Classification(Evaluation):
    """Accuracy, macro F1 and calibration on held-out texts with labels."""

    KIND: ClassVar[str] = "classification"
    APPLIES_TO: ClassVar[str] = "Classifiers, and held-out conversations that end in one of their labels."
    MODELS: ClassVar[tuple[str, ...]] = ("classifier",)
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions",)

    kind: Literal["classification"] = Field(description="Kind of evaluation")
    texts: int = Field(default=1000, description="Maximum number of held-out texts", ge=1)

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return accuracy, macro F1, the accuracy of the most frequent label, and calibration."""
        return (*MEANS, *OTHERS) if facts.instructions and not facts.numeric else ()

    def measure(self, subject: "Subject") -> Result:
        """Classify the held-out texts."""
        classifier = subject.classifier
        if classifier.labels is None:
            return Result(absent="the model gives a number and no label")
        table = [row for row in subject.table if row["messages"][-1]["role"] == "assistant"]
        chosen = choose_conversations(table, "heldout", self.texts)
        known = [row for row in chosen if label_of(row) in classifier.labels]
        encoded = [classifier.encode(row["messages"][:-1]) for row in known]
        fitting = [at for at, ids in enumerate(encoded) if len(ids) <= classifier.context]
        details = {
            "texts": len(fitting), "unknown_label": len(chosen) - len(known), "too_long": len(known) - len(fitting),
        }  # fmt: skip
        if not fitting:
            absent = "no held-out text has a label of the model and fits its context" if chosen else NOTHING_HELD_OUT
            return Result(absent=absent, details=details)
        used = [known[at] for at in fitting]
        figures, rows = _score(classifier, used, [encoded[at] for at in fitting], majority_label(table))
        subject.mark_seen_text(rows, [row["messages"][:-1] for row in used])
        found, means = means_of(rows, MEANS)
        return Result(found | figures, rows, means=means, details=details)


def label_of(row: Row) -> str:
    """Return a row's label: the last answer, stripped as in training."""
    return str(row["messages"][-1]["content"]).strip()


def majority_label(table: Sequence[Row]) -> str | None:
    """Return the most frequent label of the training rows; None without one."""
    counts = Counter(label_of(row) for row in table if row["split"] == "train")
    return counts.most_common(1)[0][0] if counts else None


def _score(
    classifier: "Classifier", used: Rows, encoded: Sequence[list[int]], majority: str | None
) -> tuple[dict[str, Any], Rows]:
    """Return the figures that do not follow from the rows alone, and the rows."""
    names = classifier.labels or []
    scores = probabilities(classifier.logits(encoded))  # (N, labels)
    predicted, targets = scores.argmax(-1), np.array([names.index(label_of(row)) for row in used])
    metrics = label_metrics(predicted, targets, len(names), names.index(majority) if majority in names else -1)
    calibration = expected_calibration_error(scores.max(-1), predicted == targets)
    rows = [
        {**answer_row(row, KIND, names[at]), "extracted": names[at], "reference": label_of(row),
         "correct": names[at] == label_of(row)}
        for row, at in zip(used, predicted, strict=True)
    ]  # fmt: skip
    return {**{name: metrics[name] for name in OTHERS[:2]}, OTHERS[2]: round(calibration, 4)}, rows
