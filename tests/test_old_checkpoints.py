"""Folders saved by Transformers 4 load like current ones: rotary settings, tokenizers, chat templates."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ModernBertConfig, ModernBertForMaskedLM, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from tasks.common.modelling import models
from tasks.common.overrides import rope_config
from tasks.common.text import chat
from tests.foreign_fixtures import foreign_tokenizer
from tests.training_fixtures import NUMERICS, Chain, chain

__all__ = ["chain"]

SIZES = {
    "vocab_size": 340, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
Config = dict[str, Any]


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}))


def old_llama(config: Config) -> None:
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}


def qwen() -> Any:
    rope = {"rope_type": "linear", "rope_theta": 7000.0, "factor": 2.0}
    return Qwen3(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, rope_parameters=rope))


def old_qwen(config: Config) -> None:
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}


def modernbert() -> Any:
    rope_config.install()
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 20_000.0}}
    return ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, **SPECIAL_TOKENS, layer_types=["full_attention"] * 2, rope_parameters=rope)
    )


def old_modernbert(config: Config) -> None:
    rope = config.pop("rope_parameters")
    del config["layer_types"]
    config |= {"global_rope_theta": rope["full_attention"]["rope_theta"], "local_rope_theta": 10_000.0}
    config |= {"global_attn_every_n_layers": 1, "reference_compile": None}


@pytest.mark.parametrize(
    ("make", "age"), [(llama, old_llama), (qwen, old_qwen), (modernbert, old_modernbert)], ids=["llama", "qwen3", "mb"]
)
def test_rotary_settings_of_both_forms_are_read(
    make: Callable[[], Any], age: Callable[[Config], None], tmp_path: Path
) -> None:
    """The logits equal those of the same model saved in the current format, bit for bit."""
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "new")
    foreign_tokenizer().save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert "rope_parameters" in config
    age(config)
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "old/config.json").write_text(json.dumps({**config, "transformers_version": "4.57.6"}))
    load = models.load_encoder if make is modernbert else models.load_decoder
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        new, old = (load(tmp_path / form, NUMERICS).eval()(input_ids=ids).logits for form in ("new", "old"))
        torch.testing.assert_close(new, model(input_ids=ids).logits)  # with another attention implementation
    torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_tokenizers_of_both_forms_are_read(chain: Chain, tmp_path: Path) -> None:
    """Transformers 4 stores a tokenizer class and the special tokens, with a separate file for these."""
    new = chain.path("data/tokenize/tokenizer")
    shutil.copytree(new, tmp_path / "old")
    settings = json.loads((new / "tokenizer_config.json").read_text())
    ours = chat.load_tokenizer(new)
    named = {name: getattr(ours, name) for name in ("bos_token", "eos_token", "pad_token", "mask_token")}
    known = {
        str(number): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special,
        }
        for number, token in ours.added_tokens_decoder.items()
    }  # fmt: skip
    old = {**settings, **named, "added_tokens_decoder": known, "tokenizer_class": "PreTrainedTokenizerFast"}
    old.pop("backend", None)
    (tmp_path / "old/tokenizer_config.json").write_text(json.dumps(old))
    (tmp_path / "old/special_tokens_map.json").write_text(json.dumps(named))
    theirs = chat.load_tokenizer(tmp_path / "old")
    assert theirs.get_vocab() == ours.get_vocab()
    assert theirs.chat_template == ours.chat_template
    assert theirs.model_max_length == ours.model_max_length
    assert theirs.model_input_names == ours.model_input_names
    assert {name: getattr(theirs, name) for name in named} == named
    messages = [{"role": "user", "content": "What is the capital of Åland?"}]
    assert chat.encode_prompt(theirs, messages) == chat.encode_prompt(ours, messages)
