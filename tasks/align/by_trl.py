"""DPO, RLOO and GRPO: replies are sampled and rewarded as with PPO, and TRL's trainer updates the policy.

A trainer's `train()` covers one iteration. Between iterations the only state is the weights and the optimizers' state,
so checkpoints, alarms and metrics work as with PPO.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tasks.align import estimates, pairs
from tasks.align.alternatives import Alternative, Dpo
from tasks.align.learner import Learner, check_finite
from tasks.align.pairs import Pair
from tasks.common.random_streams import Stream, seed_torch
from tasks.common.text.chat import Question
from tasks.common.training.loop import batch_at

TRL_METRIC_NAMES = {  # our metric name: TRL's
    "policy_loss": "loss",
    "update_entropy": "entropy",
    "clip_fraction": "clip_ratio/region_mean",
    "margin": "rewards/margins",
    "pair_accuracy": "rewards/accuracies",
}


@dataclass(frozen=True)
class Rollout:
    """An iteration's replies; replies to one prompt are adjacent."""

    prompts: Sequence[Question]
    replies: list[list[int]]
    scores: list[float]  # rewards, minus the penalty for a missing end token


@dataclass
class TrlLearner(Learner):
    """A policy trained by one of TRL's trainers, with its data, reward and optimizers."""

    config: Alternative
    ranked_pairs: Sequence[Pair]  # people's ranked pairs; empty unless DPO learns from rankings
    folder: str  # TRL requires an output folder; nothing is written to it
    activation_checkpointing: bool = False
    rollout: Rollout = field(default_factory=lambda: Rollout((), [], []))
    learning_rate: float = 0.0
    step_metrics: list[dict[str, float]] = field(default_factory=list)  # our metrics of an iteration's steps
    trl_logs: list[dict[str, float]] = field(default_factory=list)  # TRL's log of the same steps
    trainer: Any = field(init=False)

    def __post_init__(self) -> None:
        from tasks.align.trl_trainers import make_trainer

        self.beta = self.config.beta
        self.trainer = make_trainer(
            self.config, self.sampler, self.policy, self.tokenizer, self._optimizer_step, self.trl_logs,
            lambda: self.rollout.replies, lambda: self.rollout.scores, self.folder,
            activation_checkpointing=self.activation_checkpointing,
        )  # fmt: skip

    def sample(self, iteration: int) -> tuple[Rollout, dict[str, float]]:
        """Return an iteration's replies, grouped by prompt, with their rewards; and the metrics for the alarms."""
        samples = self.sample_replies(iteration, self._replies_per_prompt)
        kl = estimates.kl(samples.scored.logp, samples.scored.reference, "k1") * samples.reply_mask
        if self.ranked_pairs:  # no reward function: report the policy's implicit reward (Rafailov et al. 2023, eq. 5)
            samples = replace(samples, rewards=self.beta * kl.sum(1))
        return Rollout(samples.prompts, samples.replies, samples.rewards.tolist()), self.rollout_metrics(samples, kl)

    @property
    def _replies_per_prompt(self) -> int:
        return 1 if self.ranked_pairs else self.config.generations

    def iterate(self, rollout: Rollout, iteration: int, rate: float, kl: float) -> dict[str, float]:
        """Run TRL's trainer on an iteration's replies or pairs; return the metrics' means over its updates.

        `kl` is unused: beta stays at its setting.
        """
        from datasets import Dataset

        rows = self._dataset_rows(rollout, iteration)
        pair_count = {"pairs": float(len(rows))} if isinstance(self.config, Dpo) else {}
        self.rollout, self.learning_rate = rollout, rate
        self.step_metrics.clear()
        self.trl_logs.clear()
        seed_torch(self.sampler.seed, Stream.TRL_TRAINER, iteration)
        if rows:  # DPO has no pair when all replies to each prompt have the same reward
            self.trainer.train_dataset = Dataset.from_list(rows)
            self.trainer.train()
            self.policy.model.eval()
        steps = [
            {name: logs[trl_name] for name, trl_name in TRL_METRIC_NAMES.items() if trl_name in logs} | own_metrics
            for logs, own_metrics in zip(self.trl_logs, self.step_metrics, strict=True)
        ]
        means = {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else ())}
        return {**means, **pair_count, "updates": len(steps), "beta": self.beta}

    def _dataset_rows(self, rollout: Rollout, iteration: int) -> list[dict[str, Any]]:
        """Return an iteration's dataset rows: pairs for DPO, else each prompt once."""
        count, size = self._replies_per_prompt, self.sampler.episodes
        if not isinstance(self.config, Dpo):
            return [{"prompt": [dict(turn) for turn in prompt.messages]} for prompt in rollout.prompts[::count]]
        if self.ranked_pairs:
            return [pair.trl_row for pair in batch_at(self.ranked_pairs, size // 2, self.sampler.seed, iteration)]
        prompts = [prompt.ids for prompt in rollout.prompts]
        return [pair.trl_row for pair in pairs.from_replies(prompts, rollout.replies, rollout.scores, count)]

    def _optimizer_step(self) -> None:
        """Add the pretraining term's gradient to the gradient of TRL's loss, and step our optimizers."""
        import torch

        none = torch.zeros((), device=next(self.policy.model.parameters()).device)
        loss = self.ptx.backward(self.policy, self.train_engine, self.steps) if self.ptx else none
        metrics = dict(
            zip(("ptx_loss", "gradient_norm"), self.train_engine.step(loss[None], self.learning_rate), strict=True)
        )
        check_finite(metrics, self.steps + 1, self.learning_rate)
        self.steps += 1
        self.step_metrics.append(metrics)
