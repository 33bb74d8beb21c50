"""Losses by their formula. Each returns the sum over its targets, in float32; who calls it knows their number.

Sums, because a step's batch may be worked out in several parts and on several processes: only the sums of all, divided
by the number of all targets, give the mean of the whole batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.common.settings import Settings

if TYPE_CHECKING:
    import torch

IGNORED = -100


class Entropy(Settings):
    """How cross-entropy is taken."""

    smoothing: float = Field(
        description="Share of a target's weight that all tokens share alike (Szegedy et al. 2016, section 7)",
        ge=0, lt=1,
    )  # fmt: skip
    z: float = Field(description="Weight of log²Z, which keeps logits from drifting (PaLM, section 5)", ge=0, le=1)


def cross_entropy(logits: "torch.Tensor", targets: "torch.Tensor", entropy: "Entropy | None" = None) -> "torch.Tensor":
    """Return the summed negative log-likelihood (nats) of `targets` (N,) under `logits` (N, V), with what is added."""
    import torch

    smoothing = 0.0 if entropy is None else entropy.smoothing
    z = 0.0 if entropy is None else entropy.z  # asked for their truth, compilers (torch 2.11) end a program at settings
    if torch.compiler.is_compiling() and not smoothing:
        return for_compilers(logits, targets, z)
    logits = logits.float()
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    if z:
        total = total + z * logits[targets != IGNORED].logsumexp(-1).square().sum()
    return total


def for_compilers(logits: "torch.Tensor", targets: "torch.Tensor", z: float) -> "torch.Tensor":
    """Return what `cross_entropy` does without smoothing, in a form of which a compiler makes less work."""
    import torch

    from tasks.common.training.compiled_entropy import Surprise

    asked = targets != IGNORED
    surprise, partition = Surprise.apply(logits, targets.clamp(min=0))  # type: ignore[no-untyped-call]
    each = surprise + z * partition.square() if z else surprise
    return torch.where(asked, each, 0.0).sum()


def next_token(logits: "torch.Tensor", ids: "torch.Tensor", entropy: "Entropy | None" = None) -> "torch.Tensor":
    """Return the summed negative log-likelihood of each token of `ids` (B, T) after a row's first, by its forerunners.

    The targets are moved and not the logits (B, T, V) cut: a cut costs as much again as the loss (docs/decisions.md).
    """
    targets = ids.roll(-1, dims=-1)
    targets[:, -1] = IGNORED
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), entropy)


def squared_error(scores: "torch.Tensor", values: "torch.Tensor") -> "torch.Tensor":
    """Return the summed squared error between scores and values, both (N,)."""
    return (scores.float() - values.float()).square().sum()


def bradley_terry(
    scores: "torch.Tensor", pairs: Sequence[tuple[int, int, float]], margin: float = 0.0
) -> "torch.Tensor":
    """Return the summed −log σ(better − worse − margin × gap) in nats over pairs (better, worse, gap) of places.

    Stiennon et al. 2020, equation 1; the margin is that of Touvron et al. 2023 (Llama 2), equation 2. A gap that
    nobody measured (NaN) has none.
    """
    import torch

    if not pairs:
        return scores.sum() * 0
    better, worse, gaps = (list(side) for side in zip(*pairs, strict=True))
    distance = scores[better] - scores[worse]
    if margin:
        distance = distance - margin * scores.new_tensor(gaps).nan_to_num(0.0)
    return -torch.nn.functional.logsigmoid(distance).sum()


def plackett_luce(scores: "torch.Tensor", orders: Sequence[Sequence[Sequence[int]]]) -> "torch.Tensor":
    """Return the summed negative log-likelihood (nats) of orders under Plackett–Luce with these scores (N,).

    An order is its groups of places, best first; places in one group are tied, and a tie says nothing of the order
    within it: each of its members is chosen from itself and all that is worse (Xia et al. 2008, "ListMLE", for orders
    without ties).
    """
    import torch

    total = scores.sum() * 0
    for order in orders:
        for depth, group in enumerate(order[:-1]):
            below = [place for worse in order[depth + 1 :] for place in worse]
            for place in group:
                total = total + torch.logsumexp(scores[[place, *below]], 0) - scores[place]
    return total
