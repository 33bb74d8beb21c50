"""Models that tensor parallelism rejects; test_parallel.py tests its training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, ModernBertConfig, ModernBertForMaskedLM

from tasks.common.harness.job import StageError
from tasks.common.overrides import rope_config
from tasks.common.training.tensor_parallel import check_divisible, parallelize

SHAPE: dict[str, Any] = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 48}


def llama(**changes: int) -> LlamaForCausalLM:
    """Return a tiny decoder with 6 attention heads and 3 key–value heads."""
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3, **changes}))


def test_check_divisible_rejects_uneven_parts() -> None:
    check_divisible(llama(), 3)
    with pytest.raises(StageError, match=r"num_attention_heads \(6\) is not a multiple of .*processes \(4\)"):
        check_divisible(llama(), 4)
    with pytest.raises(StageError, match=r"num_key_value_heads \(3\) .*processes \(2\).*set the engine to fsdp"):
        check_divisible(llama(), 2)
    with pytest.raises(StageError, match=r"intermediate_size \(50\)"):
        check_divisible(llama(intermediate_size=50), 3)


def test_unsupported_architecture_is_rejected() -> None:
    rope_config.install()  # else Transformers rejects a ModernBERT without local attention
    encoder = ModernBertForMaskedLM(ModernBertConfig(**SHAPE, num_attention_heads=2, pad_token_id=0))
    with pytest.raises(StageError, match=r"LlamaForCausalLM decoders only, but .* is a ModernBertForMaskedLM: set"):
        check_divisible(encoder, 2)


def test_added_weights_are_rejected(tmp_path: Path) -> None:
    """Runs on a mesh of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parallelize(llama(), mesh)
        model = llama()
        model.model.layers[0].mlp.adapter = torch.nn.Linear(24, 4)
        with pytest.raises(
            StageError, match=r"cannot shard model\.layers\.0\.mlp\.adapter\.weight: .*method to full or top_layers"
        ):
            parallelize(model, mesh)
    finally:
        torch.distributed.destroy_process_group()
