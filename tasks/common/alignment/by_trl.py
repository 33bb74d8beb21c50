"""DPO, RLOO and GRPO: an iteration's replies are sampled and rated as PPO's are, and TRL's trainer learns from them.

A trainer's `train()` goes through one iteration's replies and ends, so that between two iterations nothing is to be
remembered but the weights and the optimizers' state: checkpoints, alarms and figures are those of PPO.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.common.alignment import estimates, pairs, rewards
from tasks.common.alignment.alternatives import Alternative, Dpo, replies_to_a_question
from tasks.common.alignment.learner import Sampler, must_be_finite
from tasks.common.alignment.pairs import Pair
from tasks.common.alignment.policy import Policy
from tasks.common.alignment.ptx import Term
from tasks.common.alignment.rewards import Judge
from tasks.common.evaluation import sampling, sheet
from tasks.common.text.chat import Question
from tasks.common.training.loop import batch_at
from tasks.common.training.updates import Updates

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

TOLD = {  # a figure of ours, and what TRL calls it
    "policy_loss": "loss",
    "update_entropy": "entropy",
    "clip_fraction": "clip_ratio/region_mean",
    "margin": "rewards/margins",
    "pairs_right": "rewards/accuracies",
}


@dataclass(frozen=True)
class Rollout:
    """An iteration's replies; those to one question lie side by side."""

    prompts: Sequence[Question]
    replies: list[list[int]]
    scores: list[float]  # rewards, less the penalty where a reply does not end


@dataclass
class Learner:
    """A policy that one of TRL's trainers trains, and everything that it learns from."""

    config: Alternative
    sampler: Sampler
    policy: Policy
    updates: Updates
    tokenizer: "PreTrainedTokenizerFast"
    judge: Judge
    judged_by: str
    prompts: Sequence[Question]
    ptx: Term | None
    ranked: Sequence[Pair]  # people's, where DPO learns from these
    folder: str  # that the trainer wants, and writes nothing into
    steps: int = 0
    average: "dict[str, torch.Tensor]" = field(default_factory=dict)
    rollout: Rollout = field(default_factory=lambda: Rollout((), [], []))
    rate: float = 0.0
    found: list[dict[str, float]] = field(default_factory=list)  # what our side of an iteration's steps tells
    told: list[dict[str, float]] = field(default_factory=list)  # and TRL's
    beta: float = field(init=False)
    trainer: Any = field(init=False)

    def __post_init__(self) -> None:
        from tasks.common.alignment.trl_trainers import trainer_of

        self.beta = self.config.beta
        self.trainer = trainer_of(
            self.config, self.sampler, self.policy, self.tokenizer, self._step, self.told,
            lambda: self.rollout.replies, lambda: self.rollout.scores, self.folder,
        )  # fmt: skip

    def sample(self, iteration: int) -> tuple[Rollout, dict[str, float]]:
        """Return an iteration's replies, each question's side by side, with their rewards; and the figures to watch."""
        sampler, count = self.sampler, replies_to_a_question(self.config)
        random = np.random.default_rng([sampler.seed, iteration, 1])
        chosen = random.choice(
            len(self.prompts), sampler.episodes // count, replace=sampler.episodes // count > len(self.prompts)
        )
        prompts = [self.prompts[i] for i in chosen for _ in range(count)]
        replies = self.policy.replies(
            self.tokenizer, [prompt.ids for prompt in prompts], max_new_tokens=sampler.max_new_tokens,
            temperature=sampler.temperature, seed=sampler.seed + iteration,
        )  # fmt: skip
        texts = [sampling.decode(self.tokenizer, reply) for reply in replies]
        ids, asked = [prompt.id for prompt in prompts], [prompt.messages for prompt in prompts]
        ended = [reply[-1] == self.tokenizer.eos_token_id for reply in replies]
        scores = [
            score - sampler.missing_end_penalty * (not end)
            for score, end in zip(rewards.rated(self.judge, self.judged_by, ids, asked, texts), ended, strict=True)
        ]
        read, mask, replied = self.policy.assemble(
            [prompt.ids for prompt in prompts], replies, self.tokenizer.pad_token_id
        )
        seen = self.policy.looks(read, mask, replied)
        kl = estimates.kl(seen.logp, seen.reference, "k1") * replied
        return Rollout(prompts, replies, scores), {
            "reward": float(np.mean(scores)), "reward_std": float(np.std(scores)), "kl": kl.sum(1).mean().item(),
            "entropy": estimates.masked_mean(seen.entropy, replied).item(),
            "length": float(np.mean([len(reply) for reply in replies])), "ended": float(np.mean(ended)),
            "distinct_2": sheet.distinct(texts, 2), "repetition": sheet.repetition(texts),
        }  # fmt: skip

    def iterate(self, rollout: Rollout, iteration: int, rate: float, kl: float) -> dict[str, float]:
        """Let TRL's trainer learn from an iteration's replies or pairs; return the means over its updates.

        `kl` moves nothing here: the price of leaving the tuned model stays what the settings say.
        """
        import torch
        from datasets import Dataset

        rows = self._rows(rollout, iteration)
        counted = {"pairs": float(len(rows))} if isinstance(self.config, Dpo) else {}
        self.rollout, self.rate = rollout, rate
        self.found.clear()
        self.told.clear()
        torch.manual_seed(int(np.random.SeedSequence([self.sampler.seed, iteration, 2]).generate_state(1)[0]))
        if rows:  # all replies to each question may have had one reward
            self.trainer.train_dataset = Dataset.from_list(rows)
            self.trainer.train()
            self.policy.model.eval()
        steps = [
            {name: told[theirs] for name, theirs in TOLD.items() if theirs in told} | found
            for told, found in zip(self.told, self.found, strict=True)
        ]
        means = {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else ())}
        return {**means, **counted, "updates": len(steps), "beta": self.beta}

    def _rows(self, rollout: Rollout, iteration: int) -> list[dict[str, Any]]:
        """Return what an iteration's trainer reads: pairs, or the questions that were asked, once each."""
        count, size = replies_to_a_question(self.config), self.sampler.episodes
        if not isinstance(self.config, Dpo):
            return [{"prompt": [dict(turn) for turn in prompt.messages]} for prompt in rollout.prompts[::count]]
        if self.ranked:
            return [pair.row for pair in batch_at(self.ranked, size // 2, self.sampler.seed, iteration)]
        asked = [prompt.ids for prompt in rollout.prompts]
        return [pair.row for pair in pairs.of_replies(asked, rollout.replies, rollout.scores, count)]

    def _step(self) -> None:
        """Add the pretraining term's gradient to that of TRL's loss, and take our optimizers' step."""
        import torch

        none = torch.zeros((), device=next(self.policy.model.parameters()).device)
        loss = self.ptx.add(self.policy, self.updates, self.steps) if self.ptx else none
        found = dict(zip(("ptx_loss", "gradient_norm"), self.updates.step(loss[None], self.rate), strict=True))
        must_be_finite(found, self.steps + 1, self.rate)
        self.steps += 1
        self.found.append(found)
