"""One causal pretraining on random tokens, on a GPU or, to try the script, a CPU, in a process of its own.

`benchmarks/gpu.py` starts it as `python -m benchmarks.gpu_run FILE`. Sides: `ours`, the stages' objective and loop;
`plain`, a compiled loop as nanoGPT has it (bf16 autocast, SDPA, fused AdamW). Random tokens cost what text costs.
"""

import time
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import harness
from tasks.common import flops, losses, models, tracking
from tasks.common.settings import Checkpoints, Numerics
from tasks.common.stage import Job, write_json
from tasks.common.training import Drawn, Share, Training, train

SEED = 1
WARM = 10  # steps before the clock starts: compilation, caches and the allocator


class Noise:
    """The next token of random windows; implements `training.Objective`."""

    weights: ClassVar = {"causal": 1.0}
    steady = True

    def __init__(self, model: Any, batch: int, window: int, numerics: Numerics) -> None:
        self.model, self.batch, self.window, self.numerics = model, batch, window, numerics

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's windows, token ids (B, T)."""
        import numpy as np
        import torch

        generator = np.random.default_rng([SEED, step])
        rows = generator.integers(self.model.config.vocab_size, size=(self.batch, self.window))[share.rows]
        ids = torch.from_numpy(rows)
        return Drawn(ids, {"causal": ids[:, 1:].numel()}, ids.numel(), [f"step {step}"])

    def sums(self, drawn: Drawn) -> dict[str, Any]:
        """Return the summed surprise (nats)."""
        ids = drawn.content.to(self.model.device, non_blocking=True)
        with models.autocast(self.model, self.numerics):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return {"causal": losses.next_token(logits, ids)}


def ours(noise: Noise, config: Training, job: Job) -> None:
    """Train by the stages' loop."""
    train(noise.model, noise, config, job)


def plain(noise: Noise, config: Training) -> None:
    """Train as a person would write it."""
    import torch

    model, device = noise.model, noise.model.device
    called: Any = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.optimizer.learning_rate, (0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(config.steps):
        ids = noise.draw(step, Share()).content.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            logits = called(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Do one run and write its figures."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import LlamaConfig, LlamaForCausalLM

    request = harness.read_request()
    numerics, config = Numerics.model_validate(request["numerics"]), Training.model_validate(request["config"])
    models.prepare_torch(numerics, SEED)
    ceiling = flops.ceiling(flops.GPU_WIDTH, flops.GPU_WIDTH, "bfloat16", numerics.device)
    shape = LlamaConfig(**request["shape"], attn_implementation=numerics.attention)
    model: Any = LlamaForCausalLM(shape)
    model.to(numerics.device)
    moments: list[float] = []

    def note(*_: Any) -> None:
        if numerics.device == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    noise = Noise(model, request["batch"], request["window"], numerics)
    scratch = Path(request["scratch"])
    checkpoints = Checkpoints(url=str(scratch / "checkpoints"), every_seconds=1e9)
    job = Job("pretrain", "clm", {}, {}, SEED, numerics, "benchmark", checkpoints)
    if request["side"] == "ours":
        ours(noise, config, job)
    else:
        plain(noise, config)
    warm = min(WARM, len(moments) - 2)
    tokens = (len(moments) - 1 - warm) * request["batch"] * request["window"]
    rate, cost = tokens / (moments[-1] - moments[warm]), flops.per_token(model, request["window"])
    write_json(Path(request["result"]), {
        "tokens_per_second": rate, "flops_per_second": rate * cost, "ceiling": ceiling,
        "parameters": models.parameters(model), "memory_bytes": tracking.peak_memory(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
