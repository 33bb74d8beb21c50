"""PPO updates in one or more processes, on the same replies of the fine-tuned model.

`update_policy` runs in each rank: it reads request.json of a folder and writes the new weights there.
"""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tasks.align import stage as align
from tasks.align.learner import SamplingConfig
from tasks.align.policy import Policy
from tasks.align.proximal import PpoTrainer, Rollout
from tasks.align.ptx import PtxTerm
from tasks.common import tables
from tasks.common.modelling import torch_setup
from tasks.common.settings import Parallel
from tasks.common.text import chat
from tasks.common.text.shards import Split
from tasks.common.training.parallel import World
from tasks.common.training.updates import make_engine
from tests.training_fixtures import NUMERICS, STABLE_OPTIMIZER, config


def update_policy(folder: Path) -> None:
    """Sample in each process alone, then update in all processes together."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    parallel = Parallel(processes=request["processes"], engine=request["engine"])
    numerics = NUMERICS.model_copy(update={"parallel": parallel})
    settings = config("align@policy", method=request["method"], optimizer=STABLE_OPTIMIZER)
    torch_setup.prepare_torch(numerics, 1)
    path, algorithm = Path(request["data"], "finetune/chat/model"), settings.algorithm
    tokenizer, world = chat.load_tokenizer(path), World.join(numerics)
    split = Split.open(Path(request["data"], "tokenize/shards/train"))
    table = tables.read(Path(request["data"], "validate/instructions")).to_pylist()

    def make_trainer(world: World) -> tuple[PpoTrainer, torch.nn.Module]:
        policy = Policy.load(path, settings.method, "shared", numerics, 1.0)
        trained = world.shard(policy.model)
        return PpoTrainer(
            algorithm, SamplingConfig(12, 12, 16, 1.0, 1.0, seed=1), policy,
            make_engine(settings.optimizer, policy.model, world),
            tokenizer, lambda prompts, replies: [len(text) / 10 for text in replies], "a test",
            align.training_questions(tokenizer, table, 16),
            PtxTerm.of(algorithm.ptx, split, 1, world), world,
        ), trained  # fmt: skip

    rollout, _ = make_trainer(World(0, 1, "data", "cpu"))[0].sample(request["iteration"])
    rows = slice(world.rank, None, world.size)
    rollout_fields = ((field.name, getattr(rollout, field.name)) for field in fields(Rollout))
    local_rollout = Rollout(**{name: value[rows] for name, value in rollout_fields if value is not None})
    trainer, trained = make_trainer(world)
    for policy_learns in (True, True, False):  # the last one trains the critic only
        trainer.update(local_rollout, np.arange(len(local_rollout.ids)), 1e-3, policy_learns=policy_learns)
    trainer.train_engine.gather_into(trained)
    weights = {name: value.detach().clone() for name, value in trained.named_parameters() if value.requires_grad}
    world.shutdown()
    save_file(weights, folder / "weights.safetensors")
