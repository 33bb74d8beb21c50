"""Proximal policy optimization; the comments number the steps in order and cite their sources.

Schulman et al. 2017 (PPO, equations 7 and 9), Schulman et al. 2016 (GAE, equation 16), Ziegler et al. 2019 (KL reward
and its adaptive coefficient, section 2.2), Ouyang et al. 2022 (PTX term, equation 2), Huang et al. 2024, arXiv
2403.17031 (the details: whitening, reward at the last token, penalty for a missing end token).

Matrices are (N, R): this process's N replies, padded on the right to R tokens.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tasks.align import estimates
from tasks.align.estimates import Estimator
from tasks.align.learner import Learner, check_finite
from tasks.align.policy import Part
from tasks.align.ptx import Ptx
from tasks.common.random_streams import Stream, generator
from tasks.common.settings import Settings
from tasks.common.training.checkpoints import trainable_weights

if TYPE_CHECKING:
    import torch


class Kl(Settings):
    """Settings of the KL penalty towards the tuned model."""

    estimator: Estimator = Field(default="k1", description="Estimator of a token's KL: k1 or k3 (estimates.kl)")
    coefficient: float = Field(default=0.05, description="beta: KL penalty, in reward per nat", ge=0)
    target: float = Field(default=6.0, description="Target KL of the adaptive coefficient (nats per reply)", gt=0)
    horizon: float = Field(
        default=0.0, description="Horizon of the adaptive coefficient (episodes); 0 keeps it fixed", ge=0
    )
    stop: float | None = Field(
        default=None,
        description="KL to the sampling policy (nats per token) at which an iteration's updates stop early; or null",
        gt=0,
    )


class Ppo(Settings):
    """Settings of PPO."""

    name: Literal["ppo"] = Field(description="Algorithm")
    epochs: int = Field(default=4, description="Passes over an iteration's replies", ge=1)
    gamma: float = Field(default=1.0, description="gamma of GAE", gt=0, le=1)
    gae_lambda: float = Field(default=0.95, description="lambda of GAE", ge=0, le=1)
    clip_range: float = Field(
        default=0.2, description="epsilon of the clipped probability ratio of a token", gt=0, lt=1
    )
    whiten_rewards: bool = Field(default=False, description="Scale tokens' rewards to variance 1 before GAE")
    entropy_coef: float = Field(default=0.0, description="Weight of the entropy bonus", ge=0)
    values: Literal["shared", "separate"] = Field(
        default="shared",
        description="shared: the value head reads the policy's states; separate: those of its own model",
    )
    vf_clip_range: float = Field(default=0.2, description="Clipping range of the value, in reward", gt=0)
    vf_coef: float = Field(default=0.1, description="Weight of the value loss", ge=0)
    critic_warmup_iterations: int = Field(
        default=0, description="First iterations in which only the value function is trained", ge=0
    )
    kl: Kl = Kl()
    ptx: Ptx = Ptx()
    ema_decay: float | None = Field(
        default=None,
        description="Decay of an exponential moving average of the policy's weights, which is then saved; or null",
        gt=0,
        lt=1,
    )


@dataclass
class Rollout:
    """An iteration's replies with everything that the updates need."""

    ids: "torch.Tensor"  # (N, P + R) prompt, padded on the left, then reply
    mask: "torch.Tensor"  # (N, P + R)
    reply_mask: "torch.Tensor"  # (N, R) true at reply tokens, false at padding
    logp: "torch.Tensor"  # (N, R) log-probability under the sampling policy
    values: "torch.Tensor"  # (N, R)
    advantages: "torch.Tensor"  # (N, R)
    returns: "torch.Tensor"  # (N, R)
    states: "torch.Tensor | None" = None  # (N, P + R, D) from `Policy.frozen_states`


@dataclass
class PpoTrainer(Learner):
    """Trains a policy and its value function by PPO."""

    config: Ppo

    def __post_init__(self) -> None:
        self.beta = self.config.kl.coefficient
        if self.config.ema_decay is not None:
            self.ema_weights = self.policy.weights()

    def iterate(self, rollout: Rollout, iteration: int, rate: float, kl: float) -> dict[str, float]:
        """Update on an iteration's replies, whose KL was `kl`; return the metrics' means over the updates."""
        random = generator(self.sampler.seed, Stream.MINIBATCHES, iteration)
        minibatch, step_metrics = self.sampler.minibatch // self.world.size, list[dict[str, float]]()
        orders = (random.permutation(len(rollout.ids)) for _ in range(self.config.epochs))
        batches = (order[start : start + minibatch] for order in orders for start in range(0, len(order), minibatch))
        for rows in batches:
            step_metrics.append(
                self.update(rollout, rows, rate, policy_learns=iteration >= self.config.critic_warmup_iterations)
            )
            if self.config.kl.stop is not None and step_metrics[-1]["kl_from_sampler"] > self.config.kl.stop:
                break
        beta = self.beta
        self.update_beta(kl)
        means = {name: sum(part[name] for part in step_metrics) / len(step_metrics) for name in step_metrics[0]}
        return {**means, "updates": len(step_metrics), "beta": beta}

    def sample(self, iteration: int) -> tuple[Rollout, dict[str, float]]:
        """Sample an iteration's replies; return the input of the updates and the metrics for the alarms."""
        import torch

        config, world = self.config, self.world
        # 1. Replies of the current policy. 2. Their rewards, minus the penalty for a missing end token.
        # 3. Log-probabilities and values of every reply token, under the policy and the reference.
        samples = self.sample_replies(iteration)
        reply_mask, scored = samples.reply_mask, samples.scored
        # 4. Reward of a token: the KL penalty, plus the reply's reward at its last token (Ziegler et al., section 2.2).
        kl = estimates.kl(scored.logp, scored.reference, config.kl.estimator) * reply_mask
        token_rewards = -self.beta * kl
        last = reply_mask.sum(1) - 1
        token_rewards[torch.arange(len(last)), last] += samples.rewards
        if config.whiten_rewards:
            token_rewards = estimates.whiten(token_rewards, reply_mask, world.sum, shift=False)
        # 5. Advantages and returns.
        advantages, returns = estimates.gae(token_rewards, scored.values, reply_mask, config.gamma, config.gae_lambda)
        whitened = estimates.whiten(advantages, reply_mask, world.sum)
        rollout = Rollout(
            samples.ids, samples.mask, reply_mask, scored.logp, scored.values, whitened, returns, scored.states
        )
        explained = estimates.explained_variance(scored.values, returns, reply_mask, world.sum)
        return rollout, self.rollout_metrics(samples, kl) | {"explained_variance": explained}

    def update(
        self, rollout: Rollout, rows: "np.ndarray[Any, Any]", rate: float, *, policy_learns: bool = True
    ) -> dict[str, float]:
        """Take one optimizer step on a minibatch of replies and return its metrics.

        Gradients accumulate over micro-batches; each sum is divided by the minibatch's tokens over all processes.
        """
        import torch

        config = self.config
        reply_mask = rollout.reply_mask[rows]
        tokens = self.world.sum(reply_mask.sum().float())
        totals = torch.zeros(5, device=tokens.device)
        states = None if rollout.states is None else rollout.states[rows]
        for part in self.policy.parts(rollout.ids[rows], rollout.mask[rows], reply_mask.shape[1], states):
            sums = self.loss_sums(rollout, torch.as_tensor(rows, device=part.rows.device)[part.rows], part)
            weights = sums.new_tensor([policy_learns, config.vf_coef, -config.entropy_coef * policy_learns, 0, 0])
            self.train_engine.backward((sums * weights).sum() / tokens)
            totals += sums.detach()
        names = ("policy_loss", "value_loss", "update_entropy", "clip_fraction", "kl_from_sampler")
        means = dict(zip(names, self.world.sum(totals) / tokens, strict=True))
        # 9. The pretraining term (Ouyang et al. 2022, equation 2).
        ptx = self.ptx if policy_learns else None
        means["ptx_loss"] = ptx.backward(self.policy, self.train_engine, self.steps) if ptx else tokens.new_zeros(())
        # 10. The step.
        with nullcontext() if policy_learns else self.policy.freeze_policy():
            figures = self.train_engine.step(torch.stack([*means.values()]), rate)
        metrics = dict(zip([*means, "gradient_norm"], figures, strict=True))
        check_finite(metrics, self.steps + 1, rate)
        self.steps += 1
        for name, value in trainable_weights(self.policy.model).items() if self.ema_weights else ():
            self.ema_weights[name].lerp_(value, 1 - (config.ema_decay or 0))
        return metrics

    def loss_sums(self, rollout: Rollout, rows: "torch.Tensor", part: Part) -> "torch.Tensor":
        """Return sums over the part's tokens, (5,): policy loss, value loss, entropy, clipped ratios, KL to sampler."""
        import torch

        config = self.config
        logp, values, entropy = self.policy.forward(part, entropy=config.entropy_coef > 0)

        def part_of(matrix: "torch.Tensor") -> "torch.Tensor":
            return matrix[rows, : part.width]

        # 6. Clipped policy loss (Schulman et al. 2017, equation 7).
        policy_loss, ratio = estimates.policy_losses(
            logp, part_of(rollout.logp), part_of(rollout.advantages), config.clip_range
        )
        # 7. Clipped value loss: the larger error of the value and the value clipped around the old one.
        value_loss = estimates.value_losses(
            values, part_of(rollout.values), part_of(rollout.returns), config.vf_clip_range
        )
        # 8. Metrics only: the share of clipped ratios, and KL(sampling policy, policy).
        clipped = ((ratio - 1).abs() > config.clip_range).float()
        kl_from_sampler = estimates.kl(part_of(rollout.logp), logp, "k3").detach()
        return torch.stack(
            [
                (item * part_of(rollout.reply_mask)).sum()
                for item in (policy_loss, value_loss, entropy, clipped, kl_from_sampler)
            ]
        )

    def update_beta(self, kl: float) -> None:
        """Adapt the KL coefficient to the target (Ziegler et al. 2019, section 2.2), by at most 20 % per horizon."""
        config = self.config.kl
        if config.horizon:
            error = min(max(kl / config.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * self.sampler.episodes / config.horizon
