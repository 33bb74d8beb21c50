"""Accuracy of DPO's implicit reward: how often a model raised the preferred reply's likelihood more than the other's.

The implicit reward of a reply is β times the log ratio of its likelihoods under the model and the reference model
(Rafailov et al. 2023, arXiv 2305.18290, section 4); a pair is right if the chosen reply has the higher one, for any β.
`evaluate` wrote the likelihoods that each model gives to the same held-out pairs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.compare import wilson

Row = dict[str, Any]
FIGURE = "implicit_reward_accuracy"


def accuracy(reference: Sequence[Row], model: Sequence[Row], evaluation: str) -> Row:
    """Return the accuracy over the pairs that both models scored, and its interval; both None without pairs.

    A tie counts half. Pairs of one prompt are a cluster of the interval.
    """
    old, new = (_pairs(rows, evaluation) for rows in (reference, model))
    by_prompt: dict[str, list[float]] = {}
    for pair in sorted(old.keys() & new.keys()):
        gains = {
            reply: old[pair][f"{reply}_nats"] - new[pair][f"{reply}_nats"] for reply in ("chosen", "rejected")
        }  # log ratios, in nats
        right = float(gains["chosen"] > gains["rejected"]) + 0.5 * (gains["chosen"] == gains["rejected"])
        by_prompt.setdefault(new[pair]["entity"], []).append(right)
    if not by_prompt:
        return {FIGURE: None, f"{FIGURE}_interval": None}
    sums = np.array([[sum(right), len(right)] for _, right in sorted(by_prompt.items())], dtype=float)
    return {
        FIGURE: round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4), f"{FIGURE}_interval": wilson.interval(sums),
    }  # fmt: skip


def _pairs(rows: Sequence[Row], evaluation: str) -> dict[str, Row]:
    return {row["id"]: row for row in rows if row["kind"] == "preference" and row["evaluation"] == evaluation}
