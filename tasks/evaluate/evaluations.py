"""All kinds of evaluation, and the set that is used where `evaluations` in `params.yaml` is empty."""

from typing import Annotated

from pydantic import Field

from tasks.evaluate.abstention import Abstention
from tasks.evaluate.classification import Classification
from tasks.evaluate.evaluation import Evaluation
from tasks.evaluate.exact_match import ExactMatch
from tasks.evaluate.harness import Harness
from tasks.evaluate.heldout_loss import HeldoutLoss
from tasks.evaluate.judge import Judge
from tasks.evaluate.masked_names import MaskedNames
from tasks.evaluate.overlap import Overlap
from tasks.evaluate.preferences import Preferences
from tasks.evaluate.regression import Regression
from tasks.evaluate.replies import Diversity, Reward
from tasks.evaluate.text import Text
from tasks.evaluate.toxicity import Toxicity

AnyEvaluation = Annotated[
    ExactMatch
    | HeldoutLoss
    | Overlap
    | Text
    | Reward
    | Judge
    | Diversity
    | MaskedNames
    | Classification
    | Toxicity
    | Harness
    | Abstention
    | Preferences
    | Regression,
    Field(discriminator="kind"),
]


def default_evaluations() -> dict[str, Evaluation]:
    """Return an evaluation of every kind that needs no decision by a person, named like its kind."""
    return {
        "exact_match": ExactMatch(kind="exact_match"),
        "heldout_loss": HeldoutLoss(kind="heldout_loss"),
        "overlap": Overlap(kind="overlap"),
        "reward": Reward(kind="reward"),
        "judge": Judge(kind="judge"),
        "preferences": Preferences(kind="preferences"),
        "diversity": Diversity(kind="diversity"),
        "text": Text(kind="text"),
        "masked_names": MaskedNames(kind="masked_names"),
        "classification": Classification(kind="classification"),
        "regression": Regression(kind="regression"),
    }
