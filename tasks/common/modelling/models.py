"""Models: building small decoders and encoders, loading and saving."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tasks.common import model_folder
from tasks.common.modelling import loading
from tasks.common.overrides import rope_config
from tasks.common.settings import Numerics, Settings
from tasks.common.text import chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Shape(Settings):
    """The shape of a Transformer trained from scratch."""

    hidden: int = Field(description="Width of the residual stream", ge=16, le=65536)
    layers: int = Field(description="Transformer blocks", ge=1, le=512)
    heads: int = Field(description="Attention heads a block", ge=1, le=512)
    feed_forward: int = Field(description="Width of the gated feed-forward layer", ge=16, le=262144)

    @model_validator(mode="after")
    def _check_head_width(self) -> "Shape":
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden ({self.hidden}) must be an even multiple of heads ({self.heads}), for rotary positions"
            )
        return self


def autocast(model: Any, numerics: Numerics) -> "torch.autocast":
    """Return the autocast context of a model's forward passes: bfloat16 if `numerics.dtype` sets it for its kind."""
    import torch

    return torch.autocast(numerics.device, torch.bfloat16, enabled=dtype_of(model, numerics) == "bfloat16")


def dtype_of(model: Any, numerics: Numerics) -> str:
    """Return the name of the dtype of a model's matrix products."""
    return numerics.dtype.encoder if is_encoder(model.config) else numerics.dtype.decoder


def is_encoder(config: Any) -> bool:
    """Return whether a config is of an encoder: a family with a masked model, not set up as a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return config.model_type in MASKED and not getattr(config, "is_decoder", False)


def new_decoder(
    shape: Shape, tokenizer: "PreTrainedTokenizerFast", context: int, numerics: Numerics
) -> "PreTrainedModel":
    """Return a newly initialized Llama-style causal model with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    build: Any = LlamaForCausalLM  # its `to` is typed wrongly
    model: PreTrainedModel = build(
        LlamaConfig(
            **_common_config(shape, tokenizer, context),
            num_key_value_heads=shape.heads,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            attn_implementation=numerics.attention,
        )
    ).to(numerics.device)
    return model


def new_encoder(
    shape: Shape, tokenizer: "PreTrainedTokenizerFast", context: int, numerics: Numerics
) -> "PreTrainedModel":
    """Return a newly initialized ModernBERT-style masked model (Warner et al. 2024) with global attention only."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    rope_config.install()
    build: Any = ModernBertForMaskedLM  # its `to` is typed wrongly
    model: PreTrainedModel = build(
        ModernBertConfig(
            **_common_config(shape, tokenizer, context),
            cls_token_id=tokenizer.bos_token_id,
            sep_token_id=tokenizer.eos_token_id,
            global_attn_every_n_layers=1,
            rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
            classifier_pooling="mean",
            attn_implementation=numerics.attention,
        )
    ).to(numerics.device)
    return model


def _common_config(shape: Shape, tokenizer: "PreTrainedTokenizerFast", context: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@contextmanager
def suppress_warnings(*libraries: str) -> Iterator[None]:
    """Suppress expected warnings that imported libraries log; errors pass."""
    loggers = [logging.getLogger(library) for library in libraries]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def model_kind(path: Path) -> str | None:
    """Return the kind of model in a folder, exported or not: causal, masked or classifier; None for anything else."""
    return model_folder.kind_of(model_folder.read_json(model_folder.base_of(path) / model_folder.CONFIG))


def load_decoder(path: Path, numerics: Numerics) -> "PreTrainedModel":
    """Load a causal model in float32 onto the device; raise StageError if the folder cannot be used."""
    from transformers import AutoModelForCausalLM

    return loading.load_complete(AutoModelForCausalLM, path, numerics)


def load_encoder(path: Path, numerics: Numerics) -> "PreTrainedModel":
    """Load a masked model in float32 onto the device; raise StageError if the folder cannot be used."""
    from transformers import AutoModelForMaskedLM

    return loading.load_complete(AutoModelForMaskedLM, path, numerics)


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", path: Path) -> None:
    """Save weights (safetensors), config and tokenizer so that any Transformers user can load the folder.

    A causal model's generation config lists every token that ends its replies, and nothing else: a given folder's
    sampling settings are not those of the trained model, and Transformers refuses to save some of them.
    """
    from transformers import GenerationConfig

    if model.can_generate():
        ends = chat.end_ids(model, tokenizer)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends[0] if len(ends) == 1 else list(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
    model.save_pretrained(path, safe_serialization=True)
    tokenizer.save_pretrained(path)


def weight_bytes(path: Path) -> int:
    """Return the size in bytes of a folder's weights, over all files of a sharded checkpoint."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def parameter_count(model: "torch.nn.Module") -> int:
    """Return the number of parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())
