"""Loss functions. Each returns the sum over its targets, in float32; the caller divides by the number of targets.

They return sums because a step's batch may be split into micro-batches and processes: the mean over the whole batch is
the total sum divided by the total number of targets.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.common.settings import Settings

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100


class Loss(Settings):
    """Options of the cross-entropy loss."""

    label_smoothing: float = Field(
        default=0.0,
        description="Share of a target's weight spread evenly over all tokens (Szegedy et al. 2016, section 7)",
        ge=0, lt=1,
    )  # fmt: skip
    z_loss: float = Field(
        default=0.0, description="Weight of log²Z, which keeps logits from drifting (PaLM, section 5)", ge=0, le=1
    )


def cross_entropy(logits: "torch.Tensor", targets: "torch.Tensor", loss: "Loss | None" = None) -> "torch.Tensor":
    """Return the summed negative log-likelihood (nats) of `targets` (N,) under `logits` (N, V), smoothing and z-loss.

    Targets equal to `IGNORE_INDEX` do not count.
    """
    import torch

    smoothing = 0.0 if loss is None else loss.label_smoothing
    # `is None` and not `if loss`: the truth test of a settings object breaks the compiled graph (torch 2.11).
    z = 0.0 if loss is None else loss.z_loss
    if torch.compiler.is_compiling() and not smoothing:
        return compiled_cross_entropy(logits, targets, z)
    logits = logits.float()
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    if z:
        total = total + z * logits[targets != IGNORE_INDEX].logsumexp(-1).square().sum()
    return total


def compiled_cross_entropy(logits: "torch.Tensor", targets: "torch.Tensor", z: float) -> "torch.Tensor":
    """Return the loss of `cross_entropy` without smoothing, in a form that compiles to faster code."""
    import torch

    from tasks.common.overrides.compiled_entropy import CrossEntropy

    counted = targets != IGNORE_INDEX
    nll, partition = CrossEntropy.apply(logits, targets.clamp(min=0))  # type: ignore[no-untyped-call]
    token_losses = nll + z * partition.square() if z else nll
    return torch.where(counted, token_losses, 0.0).sum()


def next_token(logits: "torch.Tensor", ids: "torch.Tensor", loss: "Loss | None" = None) -> "torch.Tensor":
    """Return the summed negative log-likelihood (nats) of the tokens of `ids` (B, T) after the first of each row.

    The targets are shifted instead of slicing the logits (B, T, V): slicing takes as long as the loss itself
    (docs/explanation/training.md#speed-on-a-cpu).
    """
    targets = ids.roll(-1, dims=-1)
    targets[:, -1] = IGNORE_INDEX
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), loss)


def squared_error(scores: "torch.Tensor", values: "torch.Tensor") -> "torch.Tensor":
    """Return the summed squared error between scores and values, both (N,)."""
    return (scores.float() - values.float()).square().sum()


def bradley_terry(
    scores: "torch.Tensor", pairs: Sequence[tuple[int, int, float]], margin: float = 0.0
) -> "torch.Tensor":
    """Return the summed −log σ(better − worse − margin × gap) in nats over pairs (better, worse, gap).

    `better` and `worse` are indices into `scores` (N,). Stiennon et al. 2020, equation 1; the margin is that of Touvron
    et al. 2023 (Llama 2), equation 2. A missing gap (NaN) counts as 0.
    """
    import torch

    if not pairs:
        return scores.sum() * 0
    better, worse, gaps = (list(side) for side in zip(*pairs, strict=True))
    distance = scores[better] - scores[worse]
    if margin:
        distance = distance - margin * scores.new_tensor(gaps).nan_to_num(0.0)
    return -torch.nn.functional.logsigmoid(distance).sum()


def plackett_luce(scores: "torch.Tensor", rankings: Sequence[Sequence[Sequence[int]]]) -> "torch.Tensor":
    """Return the summed negative log-likelihood (nats) of rankings under the Plackett–Luce model with scores (N,).

    A ranking is a list of groups of indices into `scores`, best first. Indices in one group are tied. A tie carries no
    information about the order within the group: each member is chosen from itself and all worse ones. Without ties
    this is ListMLE (Xia et al. 2008).
    """
    import torch

    total = scores.sum() * 0
    for ranking in rankings:
        for depth, group in enumerate(ranking[:-1]):
            worse_indices = [index for worse in ranking[depth + 1 :] for index in worse]
            for index in group:
                total = total + torch.logsumexp(scores[[index, *worse_indices]], 0) - scores[index]
    return total
