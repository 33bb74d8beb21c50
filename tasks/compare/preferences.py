"""Win rates: how often a judge prefers a model's sampled replies to another's, on the same held-out prompts.

Pairs are of prompts about held-out entities, which alignment has not seen. A tie counts half. The interval is clustered
by entity.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tasks.compare import wilson

Row = dict[str, Any]


class Pair(NamedTuple):
    """Two replies to the same prompt: the other model's, and the judged model's."""

    id: str
    number: int  # of the reply, if a prompt has several
    before: Row
    after: Row


def pair_replies(before: Sequence[Row], after: Sequence[Row], limit: int | None = None) -> list[Pair]:
    """Return the pairs of sampled replies to held-out prompts, in a stable order."""
    old, new = _heldout_replies(before), _heldout_replies(after)
    return [Pair(*key, old[key], new[key]) for key in sorted(old.keys() & new.keys())][:limit]


def by_score(pairs: Sequence[Pair]) -> list[float] | None:
    """Return each pair's result by the judge's scores: 1 won, 0.5 tied, 0 lost; None if a reply has no score."""
    scores = [(pair.before["judge_score"], pair.after["judge_score"]) for pair in pairs]
    if any(score is None for pair in scores for score in pair):
        return None
    return [(after > before) + 0.5 * (after == before) for before, after in scores]


def win_rate(pairs: Sequence[Pair], results: Sequence[float] | None) -> Row:
    """Return the win rate and its interval; both None without results."""
    if not pairs or results is None:
        return {"win_rate": None, "win_rate_interval": None}
    by_entity: dict[str, list[float]] = {}
    for pair, result in zip(pairs, results, strict=True):
        by_entity.setdefault(pair.after["entity"] or pair.id, []).append(result)
    sums = np.array([[sum(wins), len(wins)] for _, wins in sorted(by_entity.items())], dtype=float)
    return {
        "win_rate": round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4),
        "win_rate_interval": wilson.interval(sums),
    }


def _heldout_replies(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """Return the sampled replies to held-out prompts by (prompt id, index of the reply to it)."""
    found: dict[tuple[str, int], Row] = {}
    counts: dict[str, int] = {}
    for row in rows:
        if row["kind"] == "sampled" and row["split"] == "heldout":
            number = counts[row["id"]] = counts.get(row["id"], -1) + 1
            found[row["id"], number] = row
    return found
