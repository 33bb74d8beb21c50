"""A PPO trainer on the toy chain's tuned model, for tests of the algorithm and of the stage."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tasks.align import stage as align
from tasks.align.policy import Policy
from tasks.align.proximal import PpoTrainer, Rollout
from tasks.align.ptx import PtxTerm
from tasks.common import tables
from tasks.common.text.shards import Split
from tasks.common.training.parallel import World
from tasks.common.training.updates import make_engine
from tests.training_fixtures import NUMERICS, PPO, Chain, config

if TYPE_CHECKING:
    import torch

KL = PPO["kl"]
NO_PTX = {"weight": 0.0, "batch": 1, "window": 16, "mixture": {"statements": 0.5, "prose": 0.5}}
LEARNING_RATE = 3e-4
SINGLE_PROCESS = World(0, 1, "data", "cpu")


@pytest.fixture
def trainer(chain: Chain) -> Callable[..., PpoTrainer]:
    """Return a factory of trainers on the tuned model; the reward counts letters and the value head starts at 0.

    Keyword arguments are settings of the algorithm or of the stage.
    """

    def make(rate: Callable[[str], float] = lambda text: len(text) / 10, **changes: Any) -> PpoTrainer:
        algorithm = {**PPO, "ptx": NO_PTX, **{name: changes[name] for name in changes if name in PPO}}
        others = {name: value for name, value in changes.items() if name not in PPO}
        settings = config("align@policy", algorithm=algorithm, **others)
        path, tokenizer, inner = chain.path("data/finetune/chat/model"), chain.tokenizer(), settings.algorithm
        policy = Policy.load(path, settings.method, inner.values, NUMERICS, settings.temperature)
        split = Split.open(chain.path("data/tokenize/shards") / "train")
        table = tables.read(chain.path("data/validate/instructions")).to_pylist()
        return PpoTrainer(
            inner, align.make_sampler(settings, 1), policy,
            make_engine(settings.optimizer, policy.model, SINGLE_PROCESS), tokenizer,
            lambda prompts, replies: [rate(text) for text in replies], "a test",
            align.training_questions(tokenizer, table, settings.max_new_tokens),
            PtxTerm.of(inner.ptx, split, 1, SINGLE_PROCESS), SINGLE_PROCESS,
        )  # fmt: skip

    return make


def iterate(trainer: PpoTrainer, iteration: int, rate: float = LEARNING_RATE) -> dict[str, float]:
    """Sample and update once; return the metrics."""
    rollout, figures = trainer.sample(iteration)
    return figures | trainer.iterate(rollout, iteration, rate, figures["kl"])


def tuned_logp(trainer: PpoTrainer, rollout: Rollout) -> "torch.Tensor":
    """Return the replies' log-probabilities (N, R) under the tuned model."""
    return trainer.policy.score_rollout(rollout.ids, rollout.mask, rollout.reply_mask).reference
