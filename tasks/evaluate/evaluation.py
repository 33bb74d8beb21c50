"""The interface of an evaluation: settings, what it applies to, the figures that it can give, and the measurement.

Each kind of evaluation is a module of this package with one class that derives from `Evaluation`. The class is listed
in `evaluations.py`. Nothing else has to know about it: figures, rates and means in its `Result` reach the scorecard,
their intervals and the gates by themselves.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tasks.common.settings import Settings

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

Row = dict[str, Any]
Rows = list[Row]
CLASSIFIER_KINDS = ("classification", "regression", "classifier")


@dataclass(frozen=True)
class Facts:
    """What settings alone say about an evaluated model; None where they do not say it."""

    entry: str = ""  # of evaluate
    kind: str | None = None  # causal, masked or classifier
    numeric: bool | None = None  # whether a model with a head gives a number instead of labels; None: unknown
    roles: frozenset[str] = frozenset(("train", "judge"))  # of the reward models of the graph
    before: str | None = None  # the entry of evaluate with the model before alignment
    corpus: bool = True  # whether a source can fill the table
    instructions: bool = True
    answers: bool = True  # whether a source can give short answers
    rankings: bool = True


@dataclass(frozen=True)
class Mean:
    """How a figure follows from the rows: the sum of a column by that of another, or by the number of rows."""

    rows: str  # kind of the rows
    column: str
    split: str | None = None
    by: str | None = None  # column of the divisor; None: the number of rows
    rate: bool = False  # of true and false, which decides the interval
    scale: float = 1.0

    def as_json(self) -> Row:
        """Return the fields for the stage's metrics."""
        return dict(vars(self))

    def of(self, rows: Rows) -> float | None:
        """Return the figure of rows of its kind, rounded; None without rows."""
        chosen = [row for row in rows if row["kind"] == self.rows and self.split in (None, row["split"])]
        chosen = [row for row in chosen if row[self.column] is not None]
        divisor = sum(row[self.by] for row in chosen) if self.by else len(chosen)
        return round(self.scale * sum(row[self.column] for row in chosen) / divisor, 4) if divisor else None


@dataclass(frozen=True)
class Result:
    """What an evaluation found: figures by name, answer rows, and columns of the sampled replies.

    `sampled` is None if the evaluation does not use the sampled replies. `means` says how figures follow from rows, for
    intervals, paired differences and the figures by seen text. `details` is what else the scorecard should keep
    (versions, numbers of items). `absent` says in a sentence why there is no figure.
    """

    figures: Row = field(default_factory=dict)
    rows: Rows = field(default_factory=list)
    sampled: dict[str, list[float]] | None = None
    means: dict[str, Row] = field(default_factory=dict)
    details: Row = field(default_factory=dict)
    absent: str = ""


class Evaluation(Settings):
    """Settings that every evaluation has."""

    KIND: ClassVar[str] = ""
    APPLIES_TO: ClassVar[str] = ""  # one sentence: which models and which data
    MODELS: ClassVar[tuple[str, ...]] = ("causal",)
    INPUTS: ClassVar[tuple[str, ...]] = ()  # of the stage, besides the model
    USES_REPLIES: ClassVar[bool] = False  # whether the settings of replies in the entry of evaluate matter

    models: list[str] | None = Field(
        default=None, description="Entries of evaluate that it is for; null: every model that it applies to"
    )

    def inputs(self) -> tuple[str, ...]:
        """Return the names of the stage's inputs that it reads, besides the model."""
        return self.INPUTS

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the figures that it can give for a model, `TASK.*` for any figure of TASK; () if it does not apply."""
        raise NotImplementedError

    def measure(self, subject: "Subject") -> Result:
        """Measure the model."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Return versions of packages that figures depend on and that the lock does not list."""
        return {}

    def is_for(self, entry: str, kind: str | None) -> bool:
        """Return whether it is for an entry of evaluate with a model of this kind; None: unknown."""
        return (self.models is None or entry in self.models) and (kind is None or kind in self.MODELS)


def model_kind_of(kind: str | None) -> str | None:
    """Return causal, masked or classifier for a kind of model as the graph names it."""
    return "classifier" if kind in CLASSIFIER_KINDS else kind


def means_of(rows: Rows, means: dict[str, Mean]) -> tuple[Row, dict[str, Row]]:
    """Return the figures that follow from rows and, for the metrics, how they do."""
    return {name: mean.of(rows) for name, mean in means.items()}, {name: mean.as_json() for name, mean in means.items()}


def answer_row(row: Row, kind: str, reply: str | None, **columns: Any) -> Row:
    """Return an answer row about a row of the instructions table."""
    return {
        "id": row["id"], "entity": row["entity"], "split": row["split"], "kind": kind,
        "question": row["messages"][-2]["content"], "reply": reply, "extracted": None, "reference": row["answer"],
        "correct": None, "reward": None, "judge_score": None, **columns,
    }  # fmt: skip
