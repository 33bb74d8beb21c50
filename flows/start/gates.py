"""The gates that `bessemer init` proposes: each step must not lose what the one before it gave."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from tasks.ingest.settings import Heldout

MIN_ROWS = 100  # of a table, below which its held-out rows are too few to judge by
ALIGNMENT_COST = 0.5  # nats per token of a held-out answer that alignment may cost
EXPORT_COST = 0.05  # the same for 8-bit weights
EXPORT_BITS = 0.02  # bits per byte of held-out text that 8-bit weights may cost
MIN_PAIRS, MAX_PAIRS = 10, 100  # held-out preference pairs: as many as `init` holds out, and as are evaluated
EXPORT_ERROR = 1.1  # the mean absolute error that 8-bit weights may have, relative to before


def propose(rows: Mapping[str, int], models: list[str], *, dpo: bool = False) -> list[dict[str, Any]]:
    """Return gates for the scorecard; `rows` are those of each table, `models` the evaluated ones before the export.

    `dpo` says that the policy learnt from the preference pairs themselves.
    """
    pairs = rows.get("rankings", 0) if dpo else 0
    if rows.get("instructions", 0) >= MIN_ROWS:
        gates: list[dict[str, Any]] = [{"metric": "answer_loss", "model": "tuned", "against": "start", "max": 0.0}]
        if "policy" in models:
            gates.append({"metric": "answer_loss", "model": "policy", "against": "tuned", "max": ALIGNMENT_COST})
        gates += _order(pairs)[:1]
        return [*gates, {"metric": "answer_loss", "model": "chat", "against": models[-1], "max": EXPORT_COST}]
    if pairs >= MIN_ROWS:
        return _order(pairs)
    if rows.get("corpus", 0) >= MIN_ROWS and models == ["start"]:
        return [{"metric": "bits_per_byte", "model": "chat", "against": "start", "max": EXPORT_BITS}]
    return []


def propose_for_labels(rows: int, task: str) -> list[dict[str, Any]]:
    """Return gates on the export of a model of `rows` labelled texts."""
    if rows < MIN_ROWS:
        return []
    models = {"model": "classifier", "against": "labels"}
    if task == "regression":
        return [{"metric": "mean_absolute_error", **models, "relative": True, "max": EXPORT_ERROR}]
    return [{"metric": "accuracy", **models, "min": -_coin_error(rows, Heldout().entities)}]


def _coin_error(rows: int, share: float) -> float:
    """Return two standard errors of a coin's share of as many cases as a share of so many rows."""
    return round(1 / sqrt(min(max(rows * share, MIN_PAIRS), MAX_PAIRS)), 2)


def _order(rankings: int) -> list[dict[str, Any]]:
    """Return gates on the order of held-out pairs: of the policy no worse than a coin's, of its export no worse yet.

    The limits leave two standard errors, so that chance does not stop a release.
    """
    if rankings < MIN_ROWS:
        return []
    error = _coin_error(rankings, Heldout().rankings)
    kept = {"metric": "preference_accuracy", "min": -error}
    return [
        {"metric": "implicit_reward_accuracy", "model": "policy", "min": round(0.5 - error, 2)},
        {**kept, "model": "policy", "against": "start"},
        {**kept, "model": "chat", "against": "policy"},
    ]
