"""One fine-tuning run on a model of SmolLM2-135M's shape: full, LoRA or QLoRA.

`benchmarks/lora_memory.py` and `gpu.py` run it as `python -m benchmarks.tuning_run FILE`. Sides: `make`, which writes
the model that the others load, with random weights, because memory does not depend on them; and the methods, which load
it, train it with the stage's objective and loop, merge the adapters and save it.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from tasks.common.harness.job import Job
from tasks.common.harness.records import write_json
from tasks.common.modelling import methods, models, torch_setup
from tasks.common.settings import Checkpoints, Numerics
from tasks.common.training import tracking
from tasks.common.training.loop import Training, train
from tasks.finetune.objectives.chat import Chat, ChatObjective, PretrainingMix

SEED = 1
SHAPE = {  # HuggingFaceTB/SmolLM2-135M's config.json
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
LORA_SETTINGS: dict[str, Any] = {
    "rank": 16, "alpha": 32, "dropout": 0.0, "rank_stabilized": False, "targets": "all-linear",
}  # fmt: skip
METHODS: dict[str, methods.Method] = {
    "full": methods.Full(name="full"),
    "lora": methods.Lora(name="lora", dora=False, **LORA_SETTINGS),
    "qlora": methods.QLora(name="qlora", double_quantization=True, **LORA_SETTINGS),
}


def make(path: Path) -> None:
    """Write a model of SHAPE with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(path)


def tune(request: dict[str, Any]) -> dict[str, Any]:
    """Train with a method; return peak memory (the GPU's if used), trained parameters and seconds per step."""
    import numpy as np

    numerics, scratch = Numerics.model_validate(request["numerics"]), Path(request["scratch"])
    config, method = Training.model_validate(request["config"]), METHODS[request["side"]]
    checkpoints = Checkpoints(url=str(scratch / "checkpoints"), every_seconds=1e9)
    job = Job("finetune", None, {}, {}, SEED, numerics, f"benchmark {method.name}", checkpoints)
    torch_setup.prepare_torch(numerics, SEED)
    base = partial(models.load_decoder, Path(request["model"]), numerics)
    if isinstance(method, methods.QLora):
        model = methods.load_four_bit(Path(request["model"]), method, numerics.attention)
    else:
        model = base()
    trained = methods.apply(model, method)
    methods.cast_frozen_to_bfloat16(trained, method, numerics.dtype.decoder)
    count = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    ids = np.random.default_rng(SEED).integers(SHAPE["vocab_size"], size=request["length"]).tolist()
    conversation = ("talk", (ids, [True] * len(ids)))
    chat = Chat(name="chat", answers="all", packing=None)
    no_mix = PretrainingMix(weight=0.0, batch=1, window=16, mixture={"statements": 1.0})
    objective = ChatObjective(trained, [conversation], 1, chat, no_mix, pad_id=0, job=job)
    started = time.perf_counter()
    trained, _ = train(trained, objective, config, job)
    torch_setup.release_freed_memory()
    seconds = (time.perf_counter() - started) / config.steps
    methods.merge(trained, method, base).save_pretrained(scratch / "model")
    return {
        "peak_memory_bytes": tracking.peak_memory(), "trained_parameters": count, "seconds_per_step": seconds,
    }  # fmt: skip


def main() -> None:
    """Run the requested side and write its figures."""
    request = harness.read_request()
    if request["side"] == "make":
        make(Path(request["model"]))
        figures: dict[str, Any] = {}
    else:
        figures = tune(request)
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
