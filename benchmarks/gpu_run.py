"""One causal pretraining on random tokens, on a GPU or, to try the script, a CPU, in a process of its own.

`benchmarks/gpu.py` starts it as `python -m benchmarks.gpu_run FILE`. Sides: `ours`, the stage's objective and loop;
`plain`, a compiled loop as nanoGPT has it (bf16 autocast, SDPA, fused AdamW). Random tokens cost what text costs.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.training_run import plain_step
from tasks import pretrain
from tasks.common.identity import file_hash
from tasks.common.modelling import models
from tasks.common.settings import Checkpoints, Numerics
from tasks.common.stage import Job, write_json
from tasks.common.text.shards import Ids, Mixture
from tasks.common.training import flops, tracking
from tasks.common.training.loop import train

SEED = 1
WARM = 10  # steps before the clock starts: compilation, caches and the allocator


class Noise(Mixture):
    """Windows of random tokens in place of a text's."""

    def __init__(self, vocabulary: int, config: pretrain.Config) -> None:
        self.vocabulary, self.size = vocabulary, (config.batch, config.window)

    def batch(self, step: int, rows: slice = slice(None)) -> Ids:
        """Return a step's windows (B, T), or some of them."""
        return np.random.default_rng([SEED, step]).integers(self.vocabulary, size=self.size)[rows]


class Causal(pretrain.Causal):
    """The stage's objective on noise."""

    def __init__(self, config: pretrain.Config, job: Job, model: Any, noise: Noise) -> None:
        self.config, self.job, self.model, self.mixture = config, job, model, noise


def plain(model: Any, config: pretrain.Config, noise: Noise) -> None:
    """Train as a person would write it."""
    import torch

    called, rate = torch.compile(model), config.optimizer.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(config.steps):
        plain_step(model, called, optimizer, torch.from_numpy(noise.batch(step)).to(model.device, non_blocking=True))


def main() -> None:
    """Do one run and write its figures."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import LlamaConfig, LlamaForCausalLM

    request = harness.read_request()
    numerics = Numerics.model_validate(request["numerics"])
    config = pretrain.CausalConfig.model_validate(request["config"])
    ours = request["side"] == "ours"
    if ours:  # deterministic algorithms are our promise, not the plain loop's
        models.prepare_torch(numerics, SEED)
    else:
        torch.manual_seed(SEED)
    ceiling = flops.ceiling(flops.GPU_WIDTH, flops.GPU_WIDTH, "bfloat16", numerics.device)
    model: Any = LlamaForCausalLM(LlamaConfig(**request["shape"], attn_implementation=numerics.attention))
    model.to(numerics.device)
    moments: list[float] = []

    def note(*_: Any) -> None:
        if numerics.device == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        if len(moments) == request["stop_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(note)
    noise = Noise(model.config.vocab_size, config)
    if ours:
        store = str(Path(request["scratch"], "checkpoints"))
        checkpoints = Checkpoints(url=store, every_seconds=request["checkpoint_seconds"])
        job = Job("pretrain", "clm", {}, {}, SEED, numerics, "benchmark", checkpoints)
        train(model, Causal(config, job, model, noise), config, job)
    else:
        plain(model, config, noise)
    model.save_pretrained(Path(request["scratch"], "model"))
    warm = min(WARM, len(moments) - 2)
    tokens = (len(moments) - 1 - warm) * config.batch * config.window
    rate, cost = tokens / (moments[-1] - moments[warm]), flops.per_token(model, config.window)
    write_json(Path(request["result"]), {
        "tokens_per_second": rate, "flops_per_second": rate * cost, "ceiling": ceiling,
        "parameters": models.parameters(model), "memory_bytes": tracking.peak_memory(),
        "steps": len(moments), "weights": file_hash(Path(request["scratch"], "model", "model.safetensors")),
    })  # fmt: skip


if __name__ == "__main__":
    main()
