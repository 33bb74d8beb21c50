"""The gates that `bessemer init` proposes: each step must not lose what the one before it gave."""

from collections.abc import Mapping
from typing import Any

MIN_ROWS = 100  # of a table, below which its held-out rows are too few to judge by
ALIGNMENT_COST = 0.5  # nats per token of a held-out answer that alignment may cost
EXPORT_COST = 0.05  # the same for 8-bit weights
EXPORT_BITS = 0.02  # bits per byte of held-out text that 8-bit weights may cost


def propose(rows: Mapping[str, int], models: list[str]) -> list[dict[str, Any]]:
    """Return gates for the scorecard; `rows` are those of each table, `models` the evaluated ones before the export."""
    if rows.get("instructions", 0) >= MIN_ROWS:
        gates: list[dict[str, Any]] = [{"metric": "answer_loss", "model": "tuned", "against": "start", "max": 0.0}]
        if "policy" in models:
            gates.append({"metric": "answer_loss", "model": "policy", "against": "tuned", "max": ALIGNMENT_COST})
        return [*gates, {"metric": "answer_loss", "model": "chat", "against": models[-1], "max": EXPORT_COST}]
    if rows.get("corpus", 0) >= MIN_ROWS and models == ["start"]:
        return [{"metric": "bits_per_byte", "model": "chat", "against": "start", "max": EXPORT_BITS}]
    return []
