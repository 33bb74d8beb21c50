"""A trainer of PPO on the toy chain's tuned model, for tests of the algorithm and of the stage."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tasks import ppo
from tasks.common import tables
from tasks.common.alignment.policy import Policy
from tasks.common.alignment.proximal import Rollout, Trainer
from tasks.common.alignment.ptx import Term
from tasks.common.text.shards import Split
from tasks.common.training.parallel import World
from tasks.common.training.updates import begun
from tests.training_fixtures import NUMERICS, PROXIMAL, Chain, config

if TYPE_CHECKING:
    import torch

KL = PROXIMAL["kl"]
QUIET = {"weight": 0.0, "batch": 1, "window": 16, "mixture": {"statements": 0.5, "prose": 0.5}}
RATE = 3e-4
ALONE = World(0, 1, "data", "cpu")


@pytest.fixture
def trainer(chain: Chain) -> Callable[..., Trainer]:
    """Return a maker of trainers on the tuned model, whose judge counts letters and whose value head knows nothing.

    What it is told are settings of the algorithm or of the stage.
    """

    def make(rate: Callable[[str], float] = lambda text: len(text) / 10, **changes: Any) -> Trainer:
        algorithm = {**PROXIMAL, "ptx": QUIET, **{name: changes[name] for name in changes if name in PROXIMAL}}
        others = {name: value for name, value in changes.items() if name not in PROXIMAL}
        settings = config("ppo", algorithm=algorithm, **others)
        path, tokenizer, inner = chain.path("data/finetune/model"), chain.tokenizer(), settings.algorithm
        policy = Policy.load(path, settings.method, inner.values, NUMERICS, settings.temperature)
        split = Split.open(chain.path("data/tokenize/shards") / "train")
        table = tables.read(chain.path("data/validate/instructions")).to_pylist()
        return Trainer(
            inner, ppo.sampler_of(settings, 1), policy, begun(settings.optimizer, policy.model, ALONE), tokenizer,
            lambda prompts, replies: [rate(text) for text in replies], "a test",
            ppo.questions_of(tokenizer, table, settings.max_new_tokens),
            Term.of(inner.ptx, split, 1, ALONE), ALONE,
        )  # fmt: skip

    return make


def iterate(trainer: Trainer, iteration: int, rate: float = RATE) -> dict[str, float]:
    """Sample and learn once; return the figures."""
    rollout, figures = trainer.sample(iteration)
    return figures | trainer.iterate(rollout, iteration, rate, figures["kl"])


def tuned_logp(trainer: Trainer, rollout: Rollout) -> "torch.Tensor":
    """Return the replies' log-probabilities (N, R) under the tuned model."""
    return trainer.policy.looks(rollout.ids, rollout.mask, rollout.replied).reference
