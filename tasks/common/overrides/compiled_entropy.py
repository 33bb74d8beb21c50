"""Cross-entropy with a handwritten gradient for torch.compile. Imports torch, so import it in compiled code only.

Inductor's gradient of torch's cross-entropy first sums a one-hot row over the whole vocabulary and compares 64-bit
integers (docs/explanation/training.md).

Replaces: torch.nn.functional.cross_entropy (torch 2.13)
Delete when: a compiled step with it is as fast (`make bench-speed`).
"""

from typing import Any

import torch


class CrossEntropy(torch.autograd.Function):
    """From logits (N, V) and targets (N,): the negative log-likelihood (nats) and log Z, each (N,) in float32."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute log Z in two passes over the logits (maximum and sum), and gather the targets' logits."""
        partition = logits.float().logsumexp(-1)
        ctx.save_for_backward(logits, targets, partition)
        return partition - _target_logits(logits, targets), partition

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the logits: probability × both slopes, minus the likelihood's slope at the target."""
        logits, targets, partition = ctx.saved_tensors
        nll_grad, total_grad = grad_outputs[0], grad_outputs[0] + grad_outputs[1]
        gradient = (total_grad[:, None] * (logits.float() - partition[:, None]).exp()).to(logits.dtype)
        target_grad = total_grad * (_target_logits(logits, targets) - partition).exp() - nll_grad
        gradient[torch.arange(len(targets), device=targets.device), targets] = target_grad.to(logits.dtype)
        return gradient, None


def _target_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, targets[:, None])[:, 0].float()
