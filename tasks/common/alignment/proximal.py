"""Proximal policy optimization, written to be read beside its sources; the steps are numbered in order.

Schulman et al. 2017 (PPO, equations 7 and 9), Schulman et al. 2016 (GAE, equation 16), Ziegler et al. 2019 (KL reward
and its adaptive coefficient, section 2.2), Ouyang et al. 2022 (PTX term, equation 2), Huang et al. 2024, arXiv
2403.17031 (the details: whitening, reward at the last token, a penalty for replies that do not end).

Matrices are (N, R): this process's N replies, padded on the right to R tokens.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tasks.common.alignment import estimates, rewards
from tasks.common.alignment.estimates import Estimator, masked_mean
from tasks.common.alignment.learner import Sampler, must_be_finite
from tasks.common.alignment.policy import Part, Policy
from tasks.common.alignment.ptx import Ptx, Term
from tasks.common.alignment.rewards import Judge, RewardError
from tasks.common.alignment.rollouts import Engine
from tasks.common.evaluation import sampling, sheet
from tasks.common.settings import Settings
from tasks.common.text.chat import Question
from tasks.common.training.checkpoints import trained_weights
from tasks.common.training.parallel import World
from tasks.common.training.updates import Updates

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


class Kl(Settings):
    """What keeps the policy near the tuned model."""

    estimator: Estimator = Field(description="How a token's KL is estimated: k1 or k3 (estimates.kl)")
    coefficient: float = Field(description="beta: price of a nat of KL, in reward", ge=0)
    target: float = Field(description="KL of a reply (nats) that the coefficient is steered to", gt=0)
    horizon: float = Field(description="Episodes over which it is steered; 0 keeps it fixed", ge=0)
    stop: float | None = Field(
        description="KL (nats a token) from the policy that sampled, beyond which an iteration's updates end; or null",
        gt=0,
    )


class Proximal(Settings):
    """Settings of PPO."""

    name: Literal["ppo"] = Field(description="Algorithm")
    epochs: int = Field(description="Times that an iteration's replies are gone through", ge=1)
    discount: float = Field(description="gamma of GAE", gt=0, le=1)
    trace: float = Field(description="lambda of GAE", ge=0, le=1)
    clip: float = Field(description="epsilon: how far a token's probability ratio may move", gt=0, lt=1)
    whiten_rewards: bool = Field(description="Scale tokens' rewards to variance 1 before GAE")
    entropy: float = Field(description="Weight of the entropy bonus", ge=0)
    values: Literal["shared", "separate"] = Field(
        description="shared: the value head sits on the policy; separate: on a model of its own"
    )
    value_clip: float = Field(description="How far a value may move, in reward", gt=0)
    value_weight: float = Field(description="Weight of the value loss", ge=0)
    value_warmup: int = Field(description="First iterations in which only the values learn", ge=0)
    kl: Kl
    ptx: Ptx
    average: float | None = Field(
        description="Memory of a moving average of the policy's weights, which is then what is kept; or null",
        gt=0,
        lt=1,
    )


@dataclass
class Rollout:
    """An iteration's replies."""

    ids: "torch.Tensor"  # (N, P + R) prompt, padded on the left, then reply
    mask: "torch.Tensor"  # (N, P + R)
    replied: "torch.Tensor"  # (N, R) true at the reply's own tokens
    logp: "torch.Tensor"  # (N, R) log-probability under the policy that sampled
    values: "torch.Tensor"  # (N, R)
    advantages: "torch.Tensor"  # (N, R)
    returns: "torch.Tensor"  # (N, R)
    states: "torch.Tensor | None" = None  # (N, P + R, D) those of `Policy.below`


@dataclass
class Trainer:
    """Policy, value function and everything they learn from."""

    config: Proximal
    sampler: Sampler
    policy: Policy
    updates: Updates
    tokenizer: "PreTrainedTokenizerFast"
    judge: Judge
    judged_by: str
    prompts: Sequence[Question]
    ptx: Term | None
    world: World
    engine: Engine | None = None  # samples in the policy's place
    beta: float = field(init=False)
    steps: int = 0  # optimizer steps taken
    average: "dict[str, torch.Tensor]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.beta = self.config.kl.coefficient
        if self.config.average is not None:
            self.average = self.policy.weights()

    def iterate(self, rollout: Rollout, iteration: int, rate: float, kl: float) -> dict[str, float]:
        """Learn from an iteration's replies, whose KL was `kl`; return the means over its updates."""
        random = np.random.default_rng([self.sampler.seed, iteration, 2])
        minibatch, found = self.sampler.minibatch // self.world.size, list[dict[str, float]]()
        orders = (random.permutation(len(rollout.ids)) for _ in range(self.config.epochs))
        batches = (order[start : start + minibatch] for order in orders for start in range(0, len(order), minibatch))
        for rows in batches:
            found.append(self.update(rollout, rows, rate, policy_learns=iteration >= self.config.value_warmup))
            if self.config.kl.stop is not None and found[-1]["moved"] > self.config.kl.stop:
                break
        beta = self.beta
        self.steer(kl)
        means = {name: sum(part[name] for part in found) / len(found) for name in found[0]}
        return {**means, "updates": len(found), "beta": beta}

    def sample(self, iteration: int) -> tuple[Rollout, dict[str, float]]:
        """Return an iteration's replies with all that the updates need, and the figures to watch."""
        import torch

        config, sampler, world = self.config, self.sampler, self.world
        random = np.random.default_rng([sampler.seed, iteration, 1])
        chosen = random.choice(len(self.prompts), sampler.episodes)[world.rank :: world.size]
        prompts = [self.prompts[i] for i in chosen]
        # 1. Replies of the policy as it stands.
        seed = (sampler.seed + iteration) * world.size + world.rank
        replies = self.replies([prompt.ids for prompt in prompts], seed)
        texts = [sampling.decode(self.tokenizer, reply) for reply in replies]
        # 2. Their rewards, less a penalty where a reply does not end.
        ids, mask, replied = self.policy.assemble(
            [prompt.ids for prompt in prompts], replies, self.tokenizer.pad_token_id
        )
        ended = torch.tensor([reply[-1] == self.tokenizer.eos_token_id for reply in replies], device=ids.device)
        scores = torch.tensor(self.rated(prompts, texts), device=ids.device)
        scores = scores - sampler.missing_end_penalty * ~ended
        # 3. Log-probabilities and values of every reply token, under the policy and the tuned model.
        seen = self.policy.looks(ids, mask, replied)
        # 4. Reward of a token: the price of leaving the tuned model; the score at the last one (Ziegler et al. 2.2).
        kl = estimates.kl(seen.logp, seen.reference, config.kl.estimator) * replied
        earned = -self.beta * kl
        last = replied.sum(1) - 1
        earned[torch.arange(len(last)), last] += scores
        if config.whiten_rewards:
            earned = estimates.whiten(earned, replied, world.sum, shift=False)
        # 5. Advantages and returns.
        advantages, returns = estimates.gae(earned, seen.values, replied, config.discount, config.trace)
        white = estimates.whiten(advantages, replied, world.sum)
        rollout = Rollout(ids, mask, replied, seen.logp, seen.values, white, returns, seen.states)
        every = torch.ones_like(scores)
        mean = masked_mean(scores, every, world.sum)
        figures = {
            "reward": mean, "reward_std": masked_mean((scores - mean).square(), every, world.sum).sqrt(),
            "kl": masked_mean(kl.sum(1), every, world.sum),
            "entropy": masked_mean(seen.entropy, replied, world.sum),
            "length": masked_mean(replied.sum(1).float(), every, world.sum),
            "ended": masked_mean(ended.float(), every, world.sum),
            "distinct_2": masked_mean(sheet.distinct(texts, 2) * every, every, world.sum),
            "repetition": masked_mean(sheet.repetition(texts) * every, every, world.sum),
        }  # fmt: skip
        explained = estimates.explained_variance(seen.values, returns, replied, world.sum)
        apart = {"sampler_apart": self.engine.apart(seen.logp, replied)} if self.engine else {}
        found = {name: value.item() for name, value in figures.items()}
        return rollout, found | {"explained_variance": explained} | apart

    def replies(self, prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
        """Return what the policy replies to each prompt, from whatever samples for it."""
        sampler = self.sampler
        if self.engine:
            return self.engine.replies(
                self.policy, prompts, max_new_tokens=sampler.max_new_tokens, temperature=sampler.temperature,
                seed=seed, end=self.tokenizer.eos_token_id,
            )  # fmt: skip
        return self.policy.replies(
            self.tokenizer, prompts, max_new_tokens=sampler.max_new_tokens, temperature=sampler.temperature,
            seed=seed, most=self.world.most,
        )  # fmt: skip

    def rated(self, prompts: Sequence[Question], texts: Sequence[str]) -> list[float]:
        """Return the judge's rewards; raise StageError, in all processes, where any of them got none."""
        import torch

        failed: RewardError | None = None
        found: list[float] = []
        try:
            ids, asked = [prompt.id for prompt in prompts], [prompt.messages for prompt in prompts]
            found = rewards.rated(self.judge, self.judged_by, ids, asked, texts)
        except RewardError as error:
            failed = error
        if self.world.sum(torch.tensor(int(failed is not None), device=self.world.device)):
            raise failed or RewardError(f"the reward {self.judged_by} could not be used by another process.")
        return found

    def update(
        self, rollout: Rollout, rows: "np.ndarray[Any, Any]", rate: float, *, policy_learns: bool = True
    ) -> dict[str, float]:
        """Take one gradient step on some of the replies and return its figures.

        They are worked out some at a time; each sum is divided by the tokens of all.
        """
        import torch

        config = self.config
        replied = rollout.replied[rows]
        tokens = self.world.sum(replied.sum().float())
        totals = torch.zeros(5, device=tokens.device)
        states = None if rollout.states is None else rollout.states[rows]
        for part in self.policy.parts(rollout.ids[rows], rollout.mask[rows], replied.shape[1], states):
            sums = self.sums(rollout, torch.as_tensor(rows, device=part.rows.device)[part.rows], part)
            weights = sums.new_tensor([policy_learns, config.value_weight, -config.entropy * policy_learns, 0, 0])
            self.updates.backward((sums * weights).sum() / tokens)
            totals += sums.detach()
        names = ("policy_loss", "value_loss", "update_entropy", "clip_fraction", "moved")
        means = dict(zip(names, self.world.sum(totals) / tokens, strict=True))
        # 9. The pretraining term (Ouyang et al. 2022, equation 2).
        ptx = self.ptx if policy_learns else None
        means["ptx_loss"] = ptx.add(self.policy, self.updates, self.steps) if ptx else tokens.new_zeros(())
        # 10. The step.
        with nullcontext() if policy_learns else self.policy.held():
            figures = self.updates.step(torch.stack([*means.values()]), rate)
        found = dict(zip([*means, "gradient_norm"], figures, strict=True))
        must_be_finite(found, self.steps + 1, rate)
        self.steps += 1
        for name, value in trained_weights(self.policy.model).items() if self.average else ():
            self.average[name].lerp_(value, 1 - (config.average or 0))
        return found

    def sums(self, rollout: Rollout, rows: "torch.Tensor", part: Part) -> "torch.Tensor":
        """Return the sums over a part's tokens of: policy loss, value loss, entropy, clipped tokens, KL moved."""
        import torch

        config = self.config
        logp, values, entropy = self.policy.forward(part, entropy=config.entropy > 0)

        def of(whole: "torch.Tensor") -> "torch.Tensor":
            return whole[rows, : part.width]

        # 6. Clipped policy loss (Schulman et al. 2017, equation 7).
        policy_loss, ratio = estimates.policy_losses(logp, of(rollout.logp), of(rollout.advantages), config.clip)
        # 7. Clipped value loss: the worse of the value and the value kept near the old one.
        value_loss = estimates.value_losses(values, of(rollout.values), of(rollout.returns), config.value_clip)
        # 8. What is only watched: how many ratios the clip holds back, and KL(policy that sampled, policy).
        clipped = ((ratio - 1).abs() > config.clip).float()
        moved = estimates.kl(of(rollout.logp), logp, "k3").detach()
        return torch.stack(
            [(item * of(rollout.replied)).sum() for item in (policy_loss, value_loss, entropy, clipped, moved)]
        )

    def steer(self, kl: float) -> None:
        """Move the KL coefficient towards its target (Ziegler et al. 2019, section 2.2): at most a fifth a horizon."""
        config = self.config.kl
        if config.horizon:
            error = min(max(kl / config.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * self.sampler.episodes / config.horizon
