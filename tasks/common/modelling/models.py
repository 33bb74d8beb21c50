"""Models: building the chain's small decoder and encoder, loading and saving, and setting torch up for a stage."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from tasks.common.modelling import bfloat16, masks
from tasks.common.settings import Numerics, Settings
from tasks.common.text import chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


ENCODER_TYPE = "modernbert"
HEADS = ("score", "classifier")  # what Transformers calls the fresh layer on top of a decoder and of an encoder
GATED = ("gate_proj", "up_proj", "down_proj")  # the matrices of a feed-forward layer as Llama has it


class Shape(Settings):
    """The shape of a Transformer trained from nothing."""

    hidden: int = Field(description="Width of the residual stream", ge=16, le=65536)
    layers: int = Field(description="Transformer blocks", ge=1, le=512)
    heads: int = Field(description="Attention heads a block", ge=1, le=512)
    feed_forward: int = Field(description="Width of the gated feed-forward layer", ge=16, le=262144)

    @model_validator(mode="after")
    def _even_heads(self) -> "Shape":
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"hidden ({self.hidden}) must be an even multiple of heads ({self.heads}), for rotary positions"
            )
        return self


def prepare_torch(numerics: Numerics, seed: int) -> "torch.device":
    """Set threads, determinism and seeds of this process and return the device to compute on."""
    import os

    import torch

    from tasks.common.stage import StageError

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA's matrix products need to be deterministic
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", numerics.device)  # DeepSpeed would guess, and say so
    _keep_freed_memory()
    torch.set_num_threads(numerics.threads)
    torch.use_deterministic_algorithms(True, warn_only=numerics.device == "cuda")
    # A tenth of a step, only to show who reads what nobody has written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    masks.provide()
    narrow = "bfloat16" in (numerics.dtype.decoder, numerics.dtype.encoder)
    if numerics.device == "cpu" and narrow and not bfloat16.built_in():
        bfloat16.provide()
    if numerics.device == "cuda" and not torch.cuda.is_available():
        raise StageError(
            "numerics.device is cuda, but this machine shows no GPU to torch; set it to cpu or go to one that does."
        )
    if numerics.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(numerics.device)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor instead of handing it back to the system after each.

    Every step frees and asks for the same tensors of some MB. Handed back, they come as fresh pages that the kernel has
    to clear: 20,000 a step, a tenth of the time with one stage under way and up to a half with two side by side.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # glibc's alone
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_... of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def give_freed_memory_back() -> None:
    """Hand back to the system what was kept for the next step, once there is none."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # glibc's alone
        trim(0)


def autocast(model: Any, numerics: Numerics) -> "torch.autocast":
    """Return the context in which a model's forward passes run: bfloat16 where `numerics.dtype` says so of its kind."""
    import torch

    return torch.autocast(numerics.device, torch.bfloat16, enabled=dtype_of(model, numerics) == "bfloat16")


def dtype_of(model: Any, numerics: Numerics) -> str:
    """Return the name of the type that a model's matrix products are computed in."""
    return numerics.dtype.encoder if model.config.model_type == ENCODER_TYPE else numerics.dtype.decoder


def new_decoder(
    shape: Shape, tokenizer: "PreTrainedTokenizerFast", context: int, numerics: Numerics
) -> "PreTrainedModel":
    """Return a Llama-style causal model with fresh weights and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    build: Any = LlamaForCausalLM  # its `to` is typed wrongly
    model: PreTrainedModel = build(
        LlamaConfig(
            **_common(shape, tokenizer, context),
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
    """Return a ModernBERT-style masked model (Warner et al. 2024) with fresh weights; every layer attends globally."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    build: Any = ModernBertForMaskedLM  # its `to` is typed wrongly
    model: PreTrainedModel = build(
        ModernBertConfig(
            **_common(shape, tokenizer, context),
            cls_token_id=tokenizer.bos_token_id,
            sep_token_id=tokenizer.eos_token_id,
            global_attn_every_n_layers=1,
            global_rope_theta=10_000.0,
            classifier_pooling="mean",
            reference_compile=False,
            attn_implementation=numerics.attention,
        )
    ).to(numerics.device)
    return model


def _common(shape: Shape, tokenizer: "PreTrainedTokenizerFast", context: int) -> dict[str, Any]:
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
    model: Any, tokenizer: "PreTrainedTokenizerFast", rows: Sequence[list[int]], numerics: Numerics, together: int
) -> "torch.Tensor":
    """Return what a model's head says of each row of token ids, shape (N, outputs), `together` rows at a time.

    Of a head that says something of every token the mean over a row's tokens is meant.
    """
    import torch

    device = next(model.parameters()).device
    groups = chat.alike(rows, together)
    parts = []
    for group in groups:
        ids, mask = chat.padded([rows[i] for i in group], tokenizer.pad_token_id, device)  # (together, T)
        with autocast(model, numerics):
            found = model(input_ids=ids, attention_mask=mask).logits.float()
        if found.ndim == 3:  # (together, T, outputs)
            found = (found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        parts.append(found)
    back = torch.tensor([i for group in groups for i in group], device=device).argsort()
    return torch.cat(parts)[back]


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Keep back the warnings that libraries, already imported, log of what is meant to be so; errors pass."""
    loggers = [logging.getLogger(library) for library in libraries]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def feed_forwards(model: "PreTrainedModel") -> list[Any]:
    """Return each block's feed-forward layer, gated as Llama's are; none of a model that has another kind."""
    body: Any = model.base_model
    layers = [getattr(block, "mlp", None) for block in getattr(body, "layers", ())]
    return layers if all(hasattr(layer, part) for layer in layers for part in GATED) else []


def load_decoder(path: Path, numerics: Numerics) -> "PreTrainedModel":
    """Load a causal model in float32 onto the device; raise StageError where the folder lacks some of its weights.

    Transformers would draw those anew and only log it.
    """
    from transformers import AutoModelForCausalLM

    from tasks.common.stage import StageError

    model, found = _load(AutoModelForCausalLM, path, numerics, output_loading_info=True)
    lacking = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    if lacking:
        raise StageError(
            f"the weights in {path} are not those of its config.json: {len(lacking)} are missing or of another shape, "
            f"{', '.join(sorted(lacking)[:3])} among them; fetch the folder again."
        )
    return _on_device(model, numerics)


def load_encoder(path: Path, numerics: Numerics) -> "PreTrainedModel":
    """Load a masked model in float32 onto the device."""
    from transformers import AutoModelForMaskedLM

    return _on_device(_load(AutoModelForMaskedLM, path, numerics), numerics)


def load_scorer(path: Path, numerics: Numerics, heads: int | None = 1) -> "PreTrainedModel":
    """Load a model whose head gives one number or several, in float32, onto the device; a missing head is fresh.

    Without `heads` there are as many as the folder's config says.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

    settings = {} if heads is None else {"num_labels": heads}
    saved = AutoConfig.from_pretrained(path).architectures or []
    of_tokens = any(name.endswith("ForTokenClassification") for name in saved)
    kind: Any = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    return _on_device(_load(kind, path, numerics, **settings), numerics)


def new_scorer(
    path: Path, numerics: Numerics, heads: int, *, layers: int | None = None, of_tokens: bool = False
) -> "PreTrainedModel":
    """Load a model as a reward model begins: without dropout, each of its heads fresh, from N(0, 1/(d + 1)), bias 0.

    As Stiennon et al. 2020 and Huang et al. 2024, arXiv 2403.17031, section 6: scores begin neither all alike nor far
    apart, and a reply has the score in training that it has later. Of its blocks the lowest `layers` are kept; with
    `of_tokens` the head reads every token. Raises StageError where there are not so many blocks.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(path, num_labels=heads)
    if layers is not None:
        _keep_lowest(config, layers)
    config.classifier_dropout = 0.0  # which many a model of tokens has at 0.1 where its config says nothing
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    kind: Any = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    model: Any = _load(kind, path, numerics, config=config)
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.out_features == heads]
    head = linear[-1]
    torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)
    return _on_device(model, numerics)


def _keep_lowest(config: Any, layers: int) -> None:
    from tasks.common.stage import StageError

    if layers > config.num_hidden_layers:
        raise StageError(f"method.layers is {layers}, but the model has {config.num_hidden_layers} blocks.")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def load_classifier(path: Path, numerics: Numerics, labels: list[str]) -> "PreTrainedModel":
    """Load a model with a fresh head that gives one logit a label, in float32, onto the device."""
    from transformers import AutoModelForSequenceClassification

    names = {"id2label": dict(enumerate(labels)), "label2id": {label: place for place, label in enumerate(labels)}}
    loaded = _load(AutoModelForSequenceClassification, path, numerics, num_labels=len(labels), **names)
    return _on_device(loaded, numerics)


def _load(kind: Any, path: Path, numerics: Numerics, **settings: Any) -> Any:
    """Return what Transformers makes of a folder; a pickle is never opened, and a damaged file is a StageError."""
    import torch
    from safetensors import SafetensorError

    from tasks.common.stage import StageError

    try:
        return kind.from_pretrained(
            path, dtype=torch.float32, attn_implementation=numerics.attention, use_safetensors=True, **settings
        )
    except SafetensorError as error:
        raise StageError(
            f"the weights in {path} are damaged or only half there ({error}): fetch them again."
        ) from error


def _on_device(loaded: Any, numerics: Numerics) -> "PreTrainedModel":
    model: PreTrainedModel = loaded.to(numerics.device)
    return model


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", path: Path) -> None:
    """Save weights (safetensors), config and tokenizer so that any Transformers user can load the folder."""
    model.save_pretrained(path, safe_serialization=True)
    tokenizer.save_pretrained(path)


def weight_bytes(path: Path) -> int:
    """Return the size of a folder's weights, which Transformers cuts into several files where they are many."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def parameters(model: "torch.nn.Module") -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
