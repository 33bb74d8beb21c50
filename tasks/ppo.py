"""Align the tuned model with people's ratings by proximal policy optimization.

Run as `python -m tasks.ppo`. Written to be read beside its sources: Schulman et al. 2017 (PPO, equations 7 and 9),
Schulman et al. 2016 (GAE, equation 16), Ziegler et al. 2019 (KL reward and its adaptive coefficient, section 2.2),
Ouyang et al. 2022 (PTX term, equation 2), Huang et al. 2024, arXiv 2403.17031 (the details: whitening, reward at the
last token, a penalty for replies that do not end).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from tasks.common import stage, tables
from tasks.common.evaluation import sampling
from tasks.common.evaluation.scoring import Scorer
from tasks.common.evaluation.surprise import windows_surprise
from tasks.common.modelling import models
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.text.shards import Mixture, Split, Weights
from tasks.common.training import optimizers, tracking
from tasks.common.training.loop import History
from tasks.common.training.optimizers import Optimizer, rate_at

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {
    "model": "data/finetune/model",
    "reward": "data/reward/policy/model",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {"model": "data/ppo/model", "history": "data/ppo/history.csv"}


class Kl(Settings):
    """How far the policy may move from the tuned model."""

    coefficient: float = Field(description="beta: price of a nat of KL, in rating points", ge=0)
    target: float = Field(description="KL of a reply (nats) that the coefficient is steered to", gt=0)
    horizon: float = Field(description="Episodes over which it is steered; 0 keeps it fixed", ge=0)
    limit: float = Field(description="KL of a reply (nats) beyond which the policy goes back a step and PPO ends", gt=0)


class Ptx(Settings):
    """Pretraining text in the policy's loss, so that facts are kept."""

    weight: float = Field(description="gamma: weight of the pretraining loss; 0 leaves it out", ge=0)
    batch: int = Field(description="Windows an update", ge=1)
    window: int = Field(description="Length of a window, in tokens", ge=16)
    mixture: Weights


class Config(Settings):
    """Settings of PPO."""

    iterations: int = Field(description="Times that replies are sampled and learnt from", ge=1)
    episodes: int = Field(description="Replies an iteration", ge=2)
    minibatch: int = Field(description="Replies an update", ge=1)
    epochs: int = Field(description="Times that an iteration's replies are gone through", ge=1)
    max_new_tokens: int = Field(description="Longest reply, in tokens", ge=1)
    temperature: float = Field(description="Temperature of the sampled replies", gt=0)
    missing_end_penalty: float = Field(description="Rating points taken from a reply that does not end", ge=0)
    discount: float = Field(description="gamma of GAE", gt=0, le=1)
    trace: float = Field(description="lambda of GAE", ge=0, le=1)
    clip: float = Field(description="epsilon: how far a token's probability ratio may move", gt=0, lt=1)
    value_clip: float = Field(description="How far a value may move, in rating points", gt=0)
    value_weight: float = Field(description="Weight of the value loss", ge=0)
    kl: Kl
    ptx: Ptx
    optimizer: Optimizer


@dataclass
class Rollout:
    """An iteration's replies. Matrices have shape (N, R): N replies, padded on the right to R tokens."""

    ids: "torch.Tensor"  # (N, P + R) prompt, padded on the left, then reply
    mask: "torch.Tensor"  # (N, P + R)
    replied: "torch.Tensor"  # (N, R) true at the reply's own tokens
    logp: "torch.Tensor"  # (N, R) log-probability under the policy that sampled
    reference: "torch.Tensor"  # (N, R) the same under the tuned model
    values: "torch.Tensor"  # (N, R)
    advantages: "torch.Tensor"  # (N, R)
    returns: "torch.Tensor"  # (N, R)


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the policy and return its first and last reward, KL and entropy."""
    import torch
    from tqdm import tqdm

    device = models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
    policy = models.load_decoder(job.inputs["model"], job.numerics)
    reference = models.load_decoder(job.inputs["model"], job.numerics).eval().requires_grad_(False)
    head = torch.nn.Linear(policy.config.hidden_size, 1).to(device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    scorer = Scorer.load(job.inputs["reward"], job.numerics)
    prompts = chat.questions(tokenizer, tables.read(job.inputs["instructions"], "train").column("messages").to_pylist())
    ptx, split = config.ptx, Split.open(job.inputs["shards"] / "train")
    mixture = Mixture(split, ptx.window, ptx.batch, ptx.mixture, job.seed) if ptx.weight else None
    trainer = Trainer(config, job, tokenizer, policy, reference, head, scorer, prompts, mixture)
    history = History(every=1)
    began = time.perf_counter()
    with tracking.opened(job, every=1) as tracker:  # an iteration is many updates long
        for iteration in tqdm(range(config.iterations + 1), desc=job.name, mininterval=2):
            figures = trainer.iterate(iteration, learn=iteration < config.iterations)  # the last one only looks
            if figures is None:
                break
            history.add(iteration, figures)
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            tracker.log(iteration + 1, {**figures, "learning_rate": rate}, round(figures["length"] * config.episodes))
    job.measured(episodes_per_second=round(len(history.rows) * config.episodes / (time.perf_counter() - began), 2))
    models.save(policy, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    first, last = history.rows[0], history.rows[-1]
    return {"updates": trainer.updates} | {
        f"{name}_{when}": row[name]
        for when, row in (("first", first), ("last", last))
        for name in ("reward", "kl", "entropy")
    }


@dataclass
class Trainer:
    """Policy, value head and everything they learn from."""

    config: Config
    job: Job
    tokenizer: "PreTrainedTokenizerFast"
    policy: "PreTrainedModel"
    reference: "PreTrainedModel"
    head: "torch.nn.Linear"
    scorer: Scorer
    prompts: list[chat.Question]
    mixture: Mixture | None  # what the pretraining term reads; None where it has no weight

    def __post_init__(self) -> None:
        import torch

        self.trained = torch.nn.ModuleList([self.policy, self.head])
        self.optimizers = optimizers.build(self.config.optimizer, self.trained)
        self.beta = self.config.kl.coefficient
        self.updates = 0
        self.within_limit: dict[str, torch.Tensor] = {}  # the last weights whose replies were within kl.limit

    def iterate(self, iteration: int, *, learn: bool = True) -> dict[str, float] | None:
        """Sample, score, estimate advantages, update (unless it is only to look); return the iteration's figures.

        None means that the policy had moved beyond `kl.limit`; it is then what it was an iteration before.
        """
        rollout, figures = self.sample(iteration)
        if not self.kept_within_limit(figures["kl"]):
            return None
        if not learn:
            return figures
        random = np.random.default_rng([self.job.seed, iteration, 2])
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate_at(self.config.optimizer, iteration, self.config.iterations)
        parts: list[dict[str, float]] = []
        for _ in range(self.config.epochs):
            order = random.permutation(len(rollout.ids))
            for start in range(0, len(order), self.config.minibatch):
                part = self.update(rollout, order[start : start + self.config.minibatch])
                parts.append(part)
        figures |= {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        figures["beta"] = self.beta
        self.steer(figures["kl"])
        return figures

    def kept_within_limit(self, kl: float) -> bool:
        """Keep the policy whose replies have this KL, or go back to the one that was kept last where it is too high.

        Far from the tuned model, replies are good for the reward model alone (Gao et al. 2023, "Scaling Laws for Reward
        Model Overoptimization").
        """
        limit = self.config.kl.limit
        if kl <= limit:
            self.within_limit = {name: value.clone() for name, value in self.policy.state_dict().items()}
            return True
        self.policy.load_state_dict(self.within_limit)
        print(
            f"KL {kl:.1f} is beyond ppo.kl.limit ({limit:g}): the policy goes back an iteration, and PPO ends",
            flush=True,
        )
        return False

    def sample(self, iteration: int) -> tuple[Rollout, dict[str, float]]:
        """Return an iteration's replies with all that the updates need, and the figures to watch."""
        import torch

        config = self.config
        random = np.random.default_rng([self.job.seed, iteration, 1])
        asked = [self.prompts[i] for i in random.choice(len(self.prompts), config.episodes)]
        prompts = [question.ids for question in asked]
        # 1. Replies of the policy as it stands.
        replies = sampling.replies(
            self.policy, self.tokenizer, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            seed=self.job.seed + iteration, numerics=self.job.numerics,
        )  # fmt: skip
        # 2. What people would rate them, less a penalty where a reply does not end.
        ended = torch.tensor([reply[-1] == self.tokenizer.eos_token_id for reply in replies])
        texts = [sampling.decode(self.tokenizer, reply) for reply in replies]
        exchanges = [(question.messages, text) for question, text in zip(asked, texts, strict=True)]
        scores = torch.tensor(self.scorer.score(exchanges))
        scores = scores - config.missing_end_penalty * ~ended
        # 3. Log-probabilities and values of every reply token, under the policy and the tuned model.
        ids, mask, replied = self.assemble(prompts, replies)
        with torch.no_grad():
            logp, values, entropy = self.evaluate(self.policy, ids, mask, replied.shape[1])
            reference, _, _ = self.evaluate(self.reference, ids, mask, replied.shape[1])
        # 4. Reward of a token: the price of leaving the tuned model; the score at the last one (Ziegler et al. 2.2).
        kl = (logp - reference) * replied
        rewards = -self.beta * kl
        last = replied.sum(1) - 1
        rewards[torch.arange(len(last)), last] += scores.to(rewards.device)
        # 5. Advantages and returns.
        advantages, returns = gae(rewards, values * replied, replied, config.discount, config.trace)
        rollout = Rollout(ids, mask, replied, logp, reference, values, whiten(advantages, replied), returns)
        lengths = replied.sum(1).float()
        figures = {
            "reward": scores.mean().item(), "reward_std": scores.std().item(), "kl": kl.sum(1).mean().item(),
            "entropy": (entropy * replied).sum().item() / replied.sum().item(), "length": lengths.mean().item(),
            "ended": ended.float().mean().item(),
        }  # fmt: skip
        return rollout, figures

    def assemble(
        self, prompts: Sequence[list[int]], replies: Sequence[list[int]]
    ) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """Return ids and mask (N, P + R), prompts padded on the left, replies on the right, and replied (N, R)."""
        import torch

        fill = self.tokenizer.pad_token_id
        asked, prompted = chat.padded(prompts, fill, self.policy.device, left=True)
        said, replied = chat.padded(replies, fill, self.policy.device)
        return torch.cat([asked, said], 1), torch.cat([prompted, replied], 1).bool(), replied.bool()

    def evaluate(
        self, model: "PreTrainedModel", ids: "torch.Tensor", mask: "torch.Tensor", width: int
    ) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """Return log-probability, value and entropy (nats) of the last `width` tokens, each (N, width).

        The token at position t is predicted, and valued, from the state at t - 1. The temperature is the sampler's.
        Replies of like length go together, without the padding that none of them needs; there, all three are 0.
        """
        import torch

        found = [torch.zeros(len(ids), width, device=ids.device) for _ in range(3)]
        ends = mask.shape[1] - mask.flip(1).long().argmax(1)  # (N,) where each reply ends
        for rows in ends.argsort(stable=True).split(chat.TOGETHER):
            first, end = int(mask[rows].any(0).long().argmax()), int(ends[rows].max())
            given, seen = ids[rows, first:end], mask[rows, first:end]
            positions = (seen.long().cumsum(1) - 1).clamp(min=0)
            long = end - (ids.shape[1] - width)  # tokens of the longest of these replies
            with models.autocast(model, self.job.numerics):
                states = model.model(
                    input_ids=given, attention_mask=seen.long(), position_ids=positions, use_cache=False
                ).last_hidden_state[:, -long - 1 : -1]  # (B, long, H)
                logits = model.lm_head(states)  # (B, long, V)
            distribution = torch.log_softmax(logits.float() / self.config.temperature, dim=-1)
            logp = distribution.gather(2, given[:, -long:, None])[..., 0]
            entropy = -(distribution.exp() * distribution).sum(-1)
            for whole, part in zip(found, (logp, self.head(states.float())[..., 0], entropy), strict=True):
                whole[rows, :long] = part
        return found[0], found[1], found[2]

    def update(self, rollout: Rollout, rows: "np.ndarray[Any, Any]") -> dict[str, float]:
        """Take one gradient step on some of the replies and return its figures."""
        import torch

        config = self.config
        replied = rollout.replied[rows]
        logp, values, _ = self.evaluate(self.policy, rollout.ids[rows], rollout.mask[rows], replied.shape[1])
        # 6. Clipped policy loss (Schulman et al. 2017, equation 7).
        A = rollout.advantages[rows]
        ratio = (logp - rollout.logp[rows]).exp()
        policy_loss = masked_mean(
            torch.maximum(-A * ratio, -A * ratio.clamp(1 - config.clip, 1 + config.clip)), replied
        )
        # 7. Clipped value loss: the worse of the value and the value kept near the old one.
        old, R = rollout.values[rows], rollout.returns[rows]
        near = old + (values - old).clamp(-config.value_clip, config.value_clip)
        value_loss = 0.5 * masked_mean(torch.maximum((values - R).square(), (near - R).square()), replied)
        # 8. The pretraining term (Ouyang et al. 2022, equation 2).
        loss = policy_loss + config.value_weight * value_loss
        ptx_loss = self.ptx_loss(self.mixture) if self.mixture else loss.new_zeros(())
        loss = loss + config.ptx.weight * ptx_loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), config.optimizer.clip)
        clipped = masked_mean(((ratio - 1).abs() > config.clip).float(), replied)
        names = ("policy_loss", "value_loss", "ptx_loss", "clip_fraction", "gradient_norm")
        figures = torch.stack([policy_loss, value_loss, ptx_loss, clipped, norm]).tolist()
        if not all(map(math.isfinite, figures)):
            raise StageError(
                f"update {self.updates + 1} has no finite loss ({dict(zip(names, figures, strict=True))}); lower "
                f"ppo.optimizer.learning_rate (now {config.optimizer.learning_rate})."
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1
        return dict(zip(names, figures, strict=True))

    def ptx_loss(self, mixture: Mixture) -> "torch.Tensor":
        """Return the causal loss (nats a token) on this update's windows of pretraining text."""
        import torch

        ids = torch.from_numpy(mixture.batch(self.updates))  # (B, T)
        return windows_surprise(self.policy, ids, self.job.numerics) / ids[:, 1:].numel()

    def steer(self, kl: float) -> None:
        """Move the KL coefficient towards its target (Ziegler et al. 2019, section 2.2): at most a fifth a horizon."""
        if self.config.kl.horizon:
            error = min(max(kl / self.config.kl.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * self.config.episodes / self.config.kl.horizon


def gae(
    rewards: "torch.Tensor", values: "torch.Tensor", replied: "torch.Tensor", discount: float, trace: float
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return advantages and returns (N, R) by generalized advantage estimation; nothing comes after a reply's end."""
    import torch

    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = (delta + discount * trace * following) * replied[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def masked_mean(values: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Return the mean of the values at which the mask holds."""
    return (values * mask).sum() / mask.sum()


def whiten(values: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Return values shifted and scaled to mean 0 and variance 1 over the mask."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    return (values - mean) * (variance + 1e-8).rsqrt() * mask


if __name__ == "__main__":
    stage.main("tasks.ppo")
