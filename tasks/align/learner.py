"""Base class of all algorithms of the stage: samples an iteration's replies, gets their rewards, reports metrics."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.align import rewards
from tasks.align.estimates import masked_mean
from tasks.align.policy import Policy, RolloutScores
from tasks.align.ptx import PtxTerm
from tasks.align.rewards import RewardError, RewardFn
from tasks.align.rollouts import VllmEngine
from tasks.common.evaluation import scorecard
from tasks.common.generation import sampling
from tasks.common.harness.job import StageError
from tasks.common.random_streams import Stream, derive_seed, generator
from tasks.common.text import chat
from tasks.common.text.chat import Question
from tasks.common.training.parallel import World
from tasks.common.training.updates import TrainEngine

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings."""

    episodes: int  # replies per iteration, over all processes
    minibatch: int  # replies per update, over all processes
    max_new_tokens: int
    temperature: float
    missing_eos_penalty: float
    seed: int


@dataclass(frozen=True)
class Samples:
    """This process's N replies of an iteration, before the update."""

    prompts: Sequence[Question]
    replies: list[list[int]]
    texts: list[str]
    ids: "torch.Tensor"  # (N, P + R) prompt, padded on the left, then reply
    mask: "torch.Tensor"  # (N, P + R)
    reply_mask: "torch.Tensor"  # (N, R) true at reply tokens, false at padding
    ended: "torch.Tensor"  # (N,) whether the reply has its end token
    rewards: "torch.Tensor"  # (N,) minus the penalty for a missing end token
    scored: RolloutScores  # under the sampling policy and the reference


@dataclass
class Learner(ABC):
    """A policy with its data, reward and optimizers; `PpoTrainer` and `TrlLearner` implement the update."""

    config: Any
    sampler: SamplingConfig
    policy: Policy
    train_engine: TrainEngine
    tokenizer: "PreTrainedTokenizerFast"
    reward_fn: RewardFn
    reward_name: str  # as in the settings
    prompts: Sequence[Question]
    ptx: PtxTerm | None
    world: World
    rollout_engine: VllmEngine | None = field(default=None, kw_only=True)  # None: the policy samples by itself
    beta: float = field(init=False)  # coefficient of the KL penalty
    steps: int = field(default=0, kw_only=True)  # optimizer steps taken
    # The moving average of the weights that is saved at the end; empty without `ema_decay`.
    ema_weights: "dict[str, torch.Tensor]" = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def sample(self, iteration: int) -> tuple[Any, dict[str, float]]:
        """Sample an iteration's replies; return the input of `iterate` and the metrics for the alarms."""

    @abstractmethod
    def iterate(self, rollout: Any, iteration: int, rate: float, kl: float) -> dict[str, float]:
        """Update the policy on an iteration's replies, whose KL was `kl`; return the updates' mean metrics."""

    def sample_replies(self, iteration: int, per_prompt: int = 1) -> Samples:
        """Sample `per_prompt` adjacent replies to each prompt of an iteration and score them.

        Prompts are drawn without replacement unless there are fewer than the iteration needs.
        """
        import torch

        sampler, world = self.sampler, self.world
        random, count = generator(sampler.seed, Stream.PROMPTS, iteration), sampler.episodes // per_prompt
        chosen = random.choice(len(self.prompts), count, replace=count > len(self.prompts))
        prompts = [self.prompts[i] for i in chosen.repeat(per_prompt)[world.rank :: world.size]]
        replies = self.generate([prompt.ids for prompt in prompts], iteration)
        texts = [sampling.decode_reply(self.tokenizer, reply) for reply in replies]
        raw_rewards = self.compute_rewards(prompts, texts)
        prompt_ids = [prompt.ids for prompt in prompts]
        ids, mask, reply_mask = self.policy.assemble(prompt_ids, replies, self.tokenizer.pad_token_id)
        ends = chat.end_ids(self.policy.model, self.tokenizer)
        ended = torch.tensor([sampling.has_ended(reply, ends) for reply in replies], device=ids.device)
        penalized_rewards = torch.tensor(raw_rewards, device=ids.device) - sampler.missing_eos_penalty * ~ended
        scored = self.policy.score_rollout(ids, mask, reply_mask)
        return Samples(prompts, replies, texts, ids, mask, reply_mask, ended, penalized_rewards, scored)

    def generate(self, prompts: Sequence[list[int]], iteration: int) -> list[list[int]]:
        """Return the token ids of the policy's reply to each prompt, sampled by vLLM or by the policy itself."""
        sampler, world = self.sampler, self.world
        seed = derive_seed(sampler.seed, Stream.ROLLOUTS, iteration, world.rank)
        if self.rollout_engine:
            return self.rollout_engine.generate(
                self.policy, prompts, max_new_tokens=sampler.max_new_tokens, temperature=sampler.temperature,
                seed=seed, ends=chat.end_ids(self.policy.model, self.tokenizer),
            )  # fmt: skip
        return self.policy.generate(
            self.tokenizer, prompts, max_new_tokens=sampler.max_new_tokens, temperature=sampler.temperature,
            seed=seed, max_active=world.max,
        )  # fmt: skip

    def compute_rewards(self, prompts: Sequence[Question], texts: Sequence[str]) -> list[float]:
        """Return the rewards of replies; raise RewardError in all processes if the reward fails in any of them."""
        import torch

        failed: RewardError | None = None
        values: list[float] = []
        try:
            ids, conversations = [prompt.id for prompt in prompts], [prompt.messages for prompt in prompts]
            values = rewards.compute_rewards(self.reward_fn, self.reward_name, ids, conversations, texts)
        except RewardError as error:
            failed = error
        if self.world.sum(torch.tensor(int(failed is not None), device=self.world.device)):
            raise failed or RewardError(f"the reward {self.reward_name} could not be used by another process.")
        return values

    def rollout_metrics(self, samples: Samples, kl: "torch.Tensor") -> dict[str, float]:
        """Return an iteration's metrics, averaged over all processes; `kl` is (N, R), per token."""
        import torch

        all_reduce, reply_mask = self.world.sum, samples.reply_mask
        all_rows = torch.ones_like(samples.rewards)
        mean = masked_mean(samples.rewards, all_rows, all_reduce)
        metrics = {
            "reward": mean, "reward_std": masked_mean((samples.rewards - mean).square(), all_rows, all_reduce).sqrt(),
            "kl": masked_mean(kl.sum(1), all_rows, all_reduce),
            "entropy": masked_mean(samples.scored.entropy, reply_mask, all_reduce),
            "length": masked_mean(reply_mask.sum(1).float(), all_rows, all_reduce),
            "ended": masked_mean(samples.ended.float(), all_rows, all_reduce),
            "distinct_2": masked_mean(scorecard.distinct_n(samples.texts, 2) * all_rows, all_rows, all_reduce),
            "repetition": masked_mean(scorecard.repetition(samples.texts) * all_rows, all_rows, all_reduce),
        }  # fmt: skip
        values = {name: value.item() for name, value in metrics.items()}
        if self.rollout_engine:
            values["sampler_logprob_gap"] = self.rollout_engine.logprob_gap(samples.scored.logp, reply_mask)
        return values


def check_finite(metrics: Mapping[str, float], update: int, rate: float) -> None:
    """Raise StageError if a metric of an update is not finite."""
    if not all(map(math.isfinite, metrics.values())):
        raise StageError(
            f"update {update} has a loss or gradient that is not finite ({dict(metrics)}); lower "
            f"align.optimizer.learning_rate (the rate of this update was {rate:g})."
        )
