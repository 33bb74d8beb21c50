"""Cross-entropy written for a compiler, its gradient too. Read where a program is compiled alone: it imports torch.

Of torch's own a compiler makes a gradient that first sums a row of zeros and one over the whole vocabulary, and that
compares in 64 bits (docs/decisions.md).
"""

from typing import Any

import torch


class Surprise(torch.autograd.Function):
    """Of logits (N, V) and targets (N,), in float32: log Z less the target's own logit (nats), and log Z, each (N,)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the logits twice, for their highest and for the sum, and the targets' alone besides."""
        partition = logits.float().logsumexp(-1)
        ctx.save_for_backward(logits, targets, partition)
        return partition - _own(logits, targets), partition

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return each token's chance times the slopes, less the surprise's slope where it is the target's."""
        logits, targets, partition = ctx.saved_tensors
        of_surprise, of_both = slopes[0], slopes[0] + slopes[1]
        gradient = (of_both[:, None] * (logits.float() - partition[:, None]).exp()).to(logits.dtype)
        own = of_both * (_own(logits, targets) - partition).exp() - of_surprise
        gradient[torch.arange(len(targets), device=targets.device), targets] = own.to(logits.dtype)
        return gradient, None


def _own(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, targets[:, None])[:, 0].float()
