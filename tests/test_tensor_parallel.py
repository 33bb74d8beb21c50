"""What tensor parallelism refuses before it trains; that it learns as one process does is in test_parallel.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, ModernBertConfig, ModernBertForMaskedLM

from tasks.common.stage import StageError
from tasks.common.training.tensor_parallel import must_divide, parallelize

SHAPE: dict[str, Any] = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 48}


def llama(**changes: int) -> LlamaForCausalLM:
    """Return a tiny decoder with 6 heads, which share 3 keys and values."""
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3, **changes}))


def test_each_process_gets_a_like_part() -> None:
    must_divide(llama(), 3)
    with pytest.raises(StageError, match=r"num_attention_heads \(6\) is no multiple of .*processes \(4\)"):
        must_divide(llama(), 4)
    with pytest.raises(StageError, match=r"num_key_value_heads \(3\) .*processes \(2\).*take the engine fsdp"):
        must_divide(llama(), 2)
    with pytest.raises(StageError, match=r"intermediate_size \(50\)"):
        must_divide(llama(intermediate_size=50), 3)


def test_another_architecture_is_refused() -> None:
    encoder = ModernBertForMaskedLM(ModernBertConfig(**SHAPE, num_attention_heads=2, pad_token_id=0))
    with pytest.raises(StageError, match=r"LlamaForCausalLM decoders only, but .* is a ModernBertForMaskedLM: take"):
        must_divide(encoder, 2)


def test_added_weights_are_refused(tmp_path: Path) -> None:
    """A process alone is a mesh too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parallelize(llama(), mesh)
        model = llama()
        model.model.layers[0].mlp.adapter = torch.nn.Linear(24, 4)
        with pytest.raises(
            StageError, match=r"cannot cut model\.layers\.0\.mlp\.adapter\.weight: .*method full or top"
        ):
            parallelize(model, mesh)
    finally:
        torch.distributed.destroy_process_group()
