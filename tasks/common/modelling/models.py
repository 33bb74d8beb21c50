"""Models: building small decoders and encoders, loading and saving."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tasks.common.overrides import rope_config
from tasks.common.settings import Numerics, Settings
from tasks.common.text import chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


ENCODER_TYPE = "modernbert"
HEAD_NAMES = ("score", "classifier")  # Transformers' names of the classification head of a decoder and of an encoder


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
    return numerics.dtype.encoder if model.config.model_type == ENCODER_TYPE else numerics.dtype.decoder


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


def head_outputs(
    model: Any, tokenizer: "PreTrainedTokenizerFast", rows: Sequence[list[int]], numerics: Numerics, batch_rows: int
) -> "torch.Tensor":
    """Return the head's outputs for each row of token ids, (N, outputs) in float32, `batch_rows` rows at a time.

    The outputs of a token-level head are averaged over a row's tokens.
    """
    import torch

    device = next(model.parameters()).device
    buckets = chat.length_buckets(rows, batch_rows)
    parts = []
    for bucket in buckets:
        ids, mask = chat.pad_batch([rows[i] for i in bucket], tokenizer.pad_token_id, device)  # (rows, T)
        with autocast(model, numerics):
            outputs = model(input_ids=ids, attention_mask=mask).logits.float()
        if outputs.ndim == 3:  # (rows, T, outputs)
            outputs = (outputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        parts.append(outputs)
    restore_order = torch.tensor([i for bucket in buckets for i in bucket], device=device).argsort()
    return torch.cat(parts)[restore_order]


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


MODEL_KINDS = {  # suffix of a Transformers class name -> kind of model
    "ForCausalLM": "causal", "LMHeadModel": "causal", "ForMaskedLM": "masked",
    "ForSequenceClassification": "classifier", "ForTokenClassification": "classifier",
}  # fmt: skip


def model_kind(path: Path) -> str | None:
    """Return the kind of model in a folder, exported or not: causal, masked or classifier; None for anything else."""
    import json

    try:
        architectures = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError):
        return None
    return next((kind for suffix, kind in MODEL_KINDS.items() if str(architectures[0]).endswith(suffix)), None)


def load_decoder(path: Path, numerics: Numerics) -> "PreTrainedModel":
    """Load a causal model in float32 onto the device; raise StageError if the folder lacks some of its weights.

    Transformers would initialize missing weights at random and only log a warning.
    """
    from transformers import AutoModelForCausalLM

    from tasks.common.harness.job import StageError

    model, info = _load(AutoModelForCausalLM, path, numerics, output_loading_info=True)
    missing = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if missing:
        raise StageError(
            f"the weights in {path} do not match its config.json: {len(missing)} are missing or of another shape, "
            f"among them {', '.join(sorted(missing)[:3])}; download the folder again."
        )
    return _on_device(model, numerics)


def load_encoder(path: Path, numerics: Numerics) -> "PreTrainedModel":
    """Load a masked model in float32 onto the device."""
    from transformers import AutoModelForMaskedLM

    return _on_device(_load(AutoModelForMaskedLM, path, numerics), numerics)


def load_scorer(path: Path, numerics: Numerics, heads: int | None = 1) -> "PreTrainedModel":
    """Load a model with a scalar head of `heads` outputs, in float32, onto the device; a missing head is initialized.

    Without `heads` the folder's config gives their number.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    settings = {} if heads is None else {"num_labels": heads}
    architectures = read_config(path).architectures or []
    token_level = any(name.endswith("ForTokenClassification") for name in architectures)
    model_class: Any = AutoModelForTokenClassification if token_level else AutoModelForSequenceClassification
    return _on_device(_load(model_class, path, numerics, **settings), numerics)


def new_scorer(
    path: Path, numerics: Numerics, heads: int, *, layers: int | None = None, token_level: bool = False
) -> "PreTrainedModel":
    """Load a model to train as a reward model: no dropout, newly initialized heads from N(0, 1/(d + 1)) with bias 0.

    As in Stiennon et al. 2020 and Huang et al. 2024, arXiv 2403.17031, section 6: initial scores differ, but not by
    much, and a reply gets the same score in training as later. Only the lowest `layers` blocks are kept. With
    `token_level` the head reads every token. Raises StageError if the model has fewer blocks.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = read_config(path, num_labels=heads)
    if layers is not None:
        _keep_lowest_blocks(config, layers)
    config.classifier_dropout = 0.0  # many token-level models default to 0.1 if their config does not set it
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    model_class: Any = AutoModelForTokenClassification if token_level else AutoModelForSequenceClassification
    model: Any = _load(model_class, path, numerics, config=config)
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.out_features == heads]
    head = linear[-1]
    torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)
    return _on_device(model, numerics)


def _keep_lowest_blocks(config: Any, layers: int) -> None:
    from tasks.common.harness.job import StageError

    if layers > config.num_hidden_layers:
        raise StageError(f"method.layers is {layers}, but the model has {config.num_hidden_layers} blocks.")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def load_classifier(path: Path, numerics: Numerics, labels: list[str]) -> "PreTrainedModel":
    """Load a model with a newly initialized head of one logit per label, in float32, onto the device."""
    from transformers import AutoModelForSequenceClassification

    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    loaded = _load(AutoModelForSequenceClassification, path, numerics, num_labels=len(labels), **names)
    return _on_device(loaded, numerics)


def read_config(path: Path, **changes: Any) -> Any:
    """Read the config of a model folder; `changes` replace its settings."""
    from transformers import AutoConfig

    rope_config.install()
    return AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)


def _load(model_class: Any, path: Path, numerics: Numerics, **settings: Any) -> Any:
    """Load a folder with Transformers, from safetensors only; raise StageError if a file is damaged."""
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from tasks.common.harness.job import StageError

    rope_config.install()
    transformers_logging.disable_progress_bar()  # of loading weights, which is quick
    try:
        return model_class.from_pretrained(
            path, dtype=torch.float32, attn_implementation=numerics.attention, use_safetensors=True,
            trust_remote_code=False,  # by default Transformers asks on a terminal whether to run the folder's code
            **settings,
        )  # fmt: skip
    except SafetensorError as error:
        raise StageError(f"the weights in {path} are damaged or incomplete ({error}): download them again.") from error


def _on_device(loaded: Any, numerics: Numerics) -> "PreTrainedModel":
    model: PreTrainedModel = loaded.to(numerics.device)
    return model


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", path: Path) -> None:
    """Save weights (safetensors), config and tokenizer so that any Transformers user can load the folder."""
    model.save_pretrained(path, safe_serialization=True)
    tokenizer.save_pretrained(path)


def weight_bytes(path: Path) -> int:
    """Return the size in bytes of a folder's weights, over all files of a sharded checkpoint."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def parameter_count(model: "torch.nn.Module") -> int:
    """Return the number of parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())
