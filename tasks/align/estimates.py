"""The arithmetic of PPO: log-probabilities, KL, advantages, whitening, losses. Matrices are (N, R): replies by tokens.

`reply_mask` is true at reply tokens; values at padding are ignored. `all_reduce` sums a tensor over the processes that
train together; in a single process it returns its argument.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

AllReduce = Callable[["torch.Tensor"], "torch.Tensor"]
Estimator = Literal["k1", "k3"]


def single_process(values: "torch.Tensor") -> "torch.Tensor":
    """Return `values`: the all-reduce of a single process."""
    return values


def log_probabilities(
    logits: "torch.Tensor", chosen: "torch.Tensor", *, entropy: bool = False
) -> tuple["torch.Tensor", "torch.Tensor | None"]:
    """Return the log-probabilities of tokens (N, R) under logits (N, R, V), and with `entropy` the entropies (nats)."""
    import torch

    if entropy:
        all_logp = logits.log_softmax(-1)
        return all_logp.gather(-1, chosen[..., None])[..., 0], -(all_logp.exp() * all_logp).sum(-1)
    logp = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
    return logp.view(chosen.shape), None


def kl(logp: "torch.Tensor", reference: "torch.Tensor", estimator: Estimator) -> "torch.Tensor":
    """Return an estimate of KL(policy, reference) in nats for each token that the policy sampled, (N, R).

    k1 is log(p/q): unbiased, of either sign. k3 is q/p - 1 - log(q/p): unbiased, never negative and of lower variance
    (Schulman 2020, "Approximating KL Divergence").
    """
    log_ratio = reference - logp
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def gae(
    rewards: "torch.Tensor", values: "torch.Tensor", reply_mask: "torch.Tensor", gamma: float, gae_lambda: float
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return advantages and returns, both (N, R), by generalized advantage estimation (Schulman et al. 2016, eq. 16).

    The value after a reply's last token is 0.
    """
    import torch

    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(next_advantage)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage) * reply_mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def masked_mean(values: "torch.Tensor", mask: "torch.Tensor", all_reduce: AllReduce = single_process) -> "torch.Tensor":
    """Return the mean of the values where the mask is true, over all processes."""
    import torch

    sum_and_count = all_reduce(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    return sum_and_count[0] / sum_and_count[1]


def whiten(
    values: "torch.Tensor", mask: "torch.Tensor", all_reduce: AllReduce = single_process, *, shift: bool = True
) -> "torch.Tensor":
    """Return values scaled to variance 1 over the mask, and with `shift` moved to mean 0; 0 outside the mask."""
    mean = masked_mean(values, mask, all_reduce)
    variance = masked_mean((values - mean).square(), mask, all_reduce)
    whitened = (values - mean) * (variance + 1e-8).rsqrt()
    return (whitened if shift else whitened + mean) * mask


def policy_losses(
    logp: "torch.Tensor", old: "torch.Tensor", advantages: "torch.Tensor", clip: float
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return each token's clipped policy loss (Schulman et al. 2017, equation 7) and probability ratio, both (N, R)."""
    import torch

    ratio = (logp - old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


def value_losses(values: "torch.Tensor", old: "torch.Tensor", returns: "torch.Tensor", clip: float) -> "torch.Tensor":
    """Return each token's clipped value loss (N, R): half the larger squared error of value and clipped value."""
    import torch

    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(
    values: "torch.Tensor", returns: "torch.Tensor", mask: "torch.Tensor", all_reduce: AllReduce = single_process
) -> float:
    """Return the share of the returns' variance that the values explain: 1 is perfect, 0 is as good as the mean."""
    residuals = returns - values
    variance = masked_mean((returns - masked_mean(returns, mask, all_reduce)).square(), mask, all_reduce)
    residual_variance = masked_mean((residuals - masked_mean(residuals, mask, all_reduce)).square(), mask, all_reduce)
    return (1 - residual_variance / variance).item() if variance > 0 else 0.0
