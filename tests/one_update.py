"""One update of PPO in as many processes as have been started, on replies that the first samples from the tuned model.

Run as `python tests/one_update.py FOLDER`, where the folder's request.json says what; the new weights are left there.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tasks import ppo
from tasks.common import tables
from tasks.common.alignment.learner import Sampler
from tasks.common.alignment.policy import Policy
from tasks.common.alignment.proximal import Rollout, Trainer
from tasks.common.alignment.ptx import Term
from tasks.common.modelling import models
from tasks.common.settings import Parallel
from tasks.common.text import chat
from tasks.common.text.shards import Split
from tasks.common.training.parallel import World
from tasks.common.training.updates import begun
from tests.training_fixtures import NUMERICS, config


def main(folder: Path) -> None:
    """Sample alone, learn together."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    parallel = Parallel(processes=request["processes"], engine=request["engine"])
    numerics, settings = NUMERICS.model_copy(update={"parallel": parallel}), config("ppo", method=request["method"])
    models.prepare_torch(numerics, 1)
    path, inner = Path(request["data"], "finetune/model"), settings.algorithm
    tokenizer, world = chat.load_tokenizer(path), World.join(numerics)
    split = Split.open(Path(request["data"], "tokenize/shards/train"))
    table = tables.read(Path(request["data"], "validate/instructions")).to_pylist()

    def trainer(world: World) -> tuple[Trainer, torch.nn.Module]:
        policy = Policy.load(path, settings.method, "shared", numerics, 1.0)
        trained = world.spread(policy.model)
        return Trainer(
            inner, Sampler(12, 12, 16, 1.0, 1.0, seed=1), policy, begun(settings.optimizer, policy.model, world),
            tokenizer, lambda prompts, replies: [len(text) / 10 for text in replies], "a test",
            ppo.questions_of(tokenizer, table, 16),
            Term.of(inner.ptx, split, 1, world), world,
        ), trained  # fmt: skip

    rollout, _ = trainer(World(0, 1, "data", "cpu"))[0].sample(request["iteration"])
    share = slice(world.rank, None, world.size)
    known = ((field.name, getattr(rollout, field.name)) for field in fields(Rollout))
    mine = Rollout(**{name: value[share] for name, value in known if value is not None})
    ours, trained = trainer(world)
    for policy_learns in (True, True, False):  # each sees the weights of the one before; the last is one of a warm-up
        ours.update(mine, np.arange(len(mine.ids)), 1e-3, policy_learns=policy_learns)
    ours.updates.end(trained)
    found = {name: value.detach().clone() for name, value in trained.named_parameters() if value.requires_grad}
    world.leave()
    save_file(found, folder / "weights.safetensors")


main(Path(sys.argv[1]))
