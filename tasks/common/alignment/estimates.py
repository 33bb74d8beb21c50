"""The arithmetic of PPO: log-probabilities, KL, advantages, whitening, losses. Matrices are (N, R): replies by tokens.

`replied` is true at a reply's own tokens; what stands elsewhere is padding and changes nothing. `total` adds a tensor
up over the processes that train together; alone, it is the tensor itself.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Total = Callable[["torch.Tensor"], "torch.Tensor"]
Estimator = Literal["k1", "k3"]


def alone(values: "torch.Tensor") -> "torch.Tensor":
    """Return what a process that trains by itself adds up: its own."""
    return values


def log_probabilities(
    logits: "torch.Tensor", chosen: "torch.Tensor", *, entropy: bool = False
) -> tuple["torch.Tensor", "torch.Tensor | None"]:
    """Return the log-probability of chosen tokens (N, R) under logits (N, R, V); where asked, the entropies (nats)."""
    import torch

    if entropy:
        every = logits.log_softmax(-1)
        return every.gather(-1, chosen[..., None])[..., 0], -(every.exp() * every).sum(-1)
    logp = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
    return logp.view(chosen.shape), None


def kl(logp: "torch.Tensor", reference: "torch.Tensor", estimator: Estimator) -> "torch.Tensor":
    """Return an estimate of KL(policy, reference) in nats for each token that the policy sampled.

    k1 is log(p/q): right on average, of either sign. k3 is q/p - 1 - log(q/p): right on average, never negative and
    of less variance (Schulman 2020, "Approximating KL Divergence").
    """
    ratio = reference - logp
    return -ratio if estimator == "k1" else ratio.exp() - 1 - ratio


def gae(
    rewards: "torch.Tensor", values: "torch.Tensor", replied: "torch.Tensor", discount: float, trace: float
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return advantages and returns by generalized advantage estimation (Schulman et al. 2016, equation 16).

    Nothing comes after a reply's end: the value there is 0.
    """
    import torch

    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = (delta + discount * trace * following) * replied[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def masked_mean(values: "torch.Tensor", mask: "torch.Tensor", total: Total = alone) -> "torch.Tensor":
    """Return the mean of the values at which the mask holds, over all processes."""
    import torch

    found = total(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    return found[0] / found[1]


def whiten(values: "torch.Tensor", mask: "torch.Tensor", total: Total = alone, *, shift: bool = True) -> "torch.Tensor":
    """Return values scaled to variance 1 over the mask, and shifted to mean 0 or left at their mean."""
    mean = masked_mean(values, mask, total)
    variance = masked_mean((values - mean).square(), mask, total)
    white = (values - mean) * (variance + 1e-8).rsqrt()
    return (white if shift else white + mean) * mask


def policy_losses(
    logp: "torch.Tensor", old: "torch.Tensor", advantages: "torch.Tensor", clip: float
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return each token's clipped policy loss (Schulman et al. 2017, equation 7) and its probability ratio."""
    import torch

    ratio = (logp - old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


def value_losses(values: "torch.Tensor", old: "torch.Tensor", returns: "torch.Tensor", clip: float) -> "torch.Tensor":
    """Return each token's value loss: half the square of the worse of the value and the value kept near the old one."""
    import torch

    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def explained_variance(
    values: "torch.Tensor", returns: "torch.Tensor", mask: "torch.Tensor", total: Total = alone
) -> float:
    """Return the share of the returns' variance that the values foretell: 1 all of it, 0 no more than their mean."""
    missed = returns - values
    spread = masked_mean((returns - masked_mean(returns, mask, total)).square(), mask, total)
    left = masked_mean((missed - masked_mean(missed, mask, total)).square(), mask, total)
    return (1 - left / spread).item() if spread > 0 else 0.0
