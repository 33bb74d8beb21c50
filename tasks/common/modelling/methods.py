"""Fine-tuning methods by name: which weights each trains, and how to merge them into a plain Transformers model.

`full` trains every weight; `top_layers` the last blocks; `lora` low-rank updates (Hu et al. 2021) through PEFT,
optionally with DoRA (Liu et al. 2024) and rank-stabilized scaling (Kalajdzievski 2023); `qlora` the same on a base of
four-bit NormalFloat weights (Dettmers et al. 2023); `adapter` a narrow feed-forward layer beside each block's own;
`head` only a newly initialized head.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common.harness.job import StageError
from tasks.common.modelling import adapters
from tasks.common.modelling.head_models import HEAD_NAMES, new_weight_names
from tasks.common.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Attribute names of the final norm in Transformers: Llama, ModernBERT, GPT-2, GPT-NeoX, OPT, Phi. BERT has none.
FINAL_NORM_NAMES = ("norm", "final_norm", "ln_f", "final_layer_norm", "final_layernorm")


class Full(Settings):
    """Every weight is trained."""

    name: Literal["full"] = Field(description="Method")


class TopLayers(Settings):
    """Only the last blocks, the final norm and the head are trained (and embeddings tied to the head)."""

    name: Literal["top_layers"] = Field(description="Method")
    layers: int = Field(description="Blocks to train, counted from the top", ge=1)


class LowRank(Settings):
    """Low-rank updates of linear layers are trained, through PEFT."""

    rank: int = Field(default=16, description="Rank of an update; at most the model's width", ge=1)
    alpha: int = Field(default=32, description="Scale of an update, divided by its rank", ge=1)
    dropout: float = Field(default=0.0, description="Dropout of an update's inputs in training", ge=0, lt=1)
    rank_stabilized: bool = Field(
        default=False, description="Divide the scale by the root of the rank instead (rsLoRA)"
    )
    targets: Literal["all-linear", "attention"] = Field(
        default="all-linear", description="Linear layers that get an update"
    )


class Lora(LowRank):
    """Low-rank updates of full-precision weights."""

    name: Literal["lora"] = Field(description="Method")
    dora: bool = Field(default=False, description="Train the weights' magnitudes and directions separately (DoRA)")


class QLora(LowRank):
    """Low-rank updates of a four-bit base model, which takes a quarter of the memory; needs a GPU."""

    name: Literal["qlora"] = Field(description="Method")
    double_quantization: bool = Field(
        default=True, description="Quantize the four-bit weights' scales too (0.4 bits a weight less)"
    )


class Adapter(Settings):
    """A narrow feed-forward layer beside each block's own is trained."""

    name: Literal["adapter"] = Field(description="Method")
    width: int = Field(
        description="Neurons of an adapter; the merged model's feed-forward layers get wider by it", ge=1
    )


class Head(Settings):
    """Only a newly initialized head is trained: a linear probe on the frozen model's hidden states."""

    name: Literal["head"] = Field(description="Method")
    layers: int = Field(description="Blocks to keep, counted from the bottom: upper ones predict the next token", ge=1)
    pooling: Literal["model", "mean"] = Field(
        default="model",
        description="What the head reads: model: as the model's own classifier (a decoder's: the last token's state); "
        "mean: every token's state, with outputs averaged",
    )


Method = Full | TopLayers | Lora | QLora | Adapter | Head


def apply(model: "PreTrainedModel", method: Method) -> "torch.nn.Module":
    """Return the model to train, with all weights frozen that the method does not train. A new head is always trained.

    Raises StageError if the model does not support the method: too few blocks, too small a width, missing layers.
    """
    if isinstance(method, TopLayers):
        _unfreeze_top_layers(model, method)
    elif isinstance(method, Head):
        model.requires_grad_(False)
        _unfreeze_head(model)
    elif isinstance(method, Adapter):
        adapters.add(model, method.width)
        _unfreeze_head(model)
    elif isinstance(method, LowRank):
        return _add_lora(model, method)
    trained: torch.nn.Module = model
    return trained


def cast_frozen_to_bfloat16(model: "torch.nn.Module", method: Method, dtype: str) -> None:
    """Cast the frozen linear layers of a LoRA model to bfloat16 if autocast would cast them in each pass anyway.

    The products are identical bit for bit, the weights take half the memory, and autocast keeps no copies for the
    backward pass. Layers tied to the embedding stay in float32, because lookups are in float32; so do all layers under
    DoRA, which computes norms of them. Merge the model with a `base` afterwards (`merge`).
    """
    import torch

    if dtype != "bfloat16" or not isinstance(method, Lora) or method.dora:
        return
    embedding_weights = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if (
            isinstance(module, torch.nn.Linear)
            and not module.weight.requires_grad
            and id(module.weight) not in embedding_weights
        ):
            module.to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:  # a view of the memory-mapped file would keep the whole file in memory
            parameter.data = parameter.data.clone()


def merge(model: Any, method: Method, base: Callable[[], "PreTrainedModel"] | None = None) -> "PreTrainedModel":
    """Return a plain Transformers model with the trained weights merged.

    `base` loads the initial model in full precision, and low-rank updates are added to it. Adding them to dequantized
    four-bit or bfloat16 weights would keep the rounding error (measured in docs/explanation/training.md#qlora). Without
    `base` they are added to the weights that they were trained with.
    """
    if isinstance(method, Adapter):
        adapters.merge(model)
    if isinstance(method, LowRank) and base is not None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        updates = get_peft_model_state_dict(model, save_embedding_layers=False)
        model = _add_lora(base(), method)
        set_peft_model_state_dict(model, updates)
    merged: PreTrainedModel = model.merge_and_unload() if isinstance(method, LowRank) else model
    return merged


@contextmanager
def adapters_merged(model: Any, method: Method) -> Iterator[None]:
    """Context in which low-rank updates are merged into the weights, for faster passes without gradients.

    On exit the original weights are restored bit for bit. DoRA's updates are not additive and are not merged.
    """
    if not isinstance(method, Lora) or method.dora:
        yield
        return
    import torch
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights: list[torch.nn.Parameter] = [layer.get_base_layer().weight for layer in layers]
    originals = [weight.data for weight in weights]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                (name,) = layer.active_adapters
                weight.data = (weight.data.float() + layer.get_delta_weight(name).float()).to(weight.dtype)
        with model.disable_adapter():
            yield
    finally:
        for weight, data in zip(weights, originals, strict=True):
            weight.data = data


def load_four_bit(path: Path, method: QLora, attention: str) -> "PreTrainedModel":
    """Load a causal model onto the GPU with four-bit linear layers; raise StageError without bitsandbytes."""
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise StageError(
            "finetune.method is qlora, which needs bitsandbytes: pip install -c requirements.lock bitsandbytes."
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=quantization,
        dtype=torch.float32,
        attn_implementation=attention,
        device_map={"": torch.cuda.current_device()},
        trust_remote_code=False,
    )
    return model


def _unfreeze_head(model: "PreTrainedModel") -> None:
    for name in HEAD_NAMES:
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)
    for name in new_weight_names(model):
        model.get_parameter(name).requires_grad_(True)


def _unfreeze_top_layers(model: "PreTrainedModel", method: TopLayers) -> None:
    body: Any = model.base_model
    parent, blocks = find_blocks(body)
    if blocks is None:
        raise StageError(
            f"method top_layers needs a model with one list of blocks, and {type(model).__name__} has none: use full "
            "or lora."
        )
    if method.layers > len(blocks):
        raise StageError(f"method.layers is {method.layers}, but the model has {len(blocks)} blocks.")
    model.requires_grad_(False)
    norms = [getattr(parent, name, None) for name in FINAL_NORM_NAMES]
    top_modules = [part for part in model.children() if part is not body]
    for module in (*blocks[-method.layers :], *(norm for norm in norms if norm is not None), *top_modules):
        module.requires_grad_(True)
    _unfreeze_head(model)


def find_blocks(body: "torch.nn.Module") -> tuple[Any, Any]:
    """Return a model's list of blocks and the module that holds it; (None, None) if it has none of that length."""
    import torch

    config: Any = body.config
    count = config.get_text_config().num_hidden_layers
    for name, module in body.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return body.get_submodule(name.rpartition(".")[0]), module
    return None, None


def _add_lora(model: "PreTrainedModel", method: LowRank) -> "torch.nn.Module":
    from peft import LoraConfig, get_peft_model

    width = model.config.hidden_size
    if method.rank > width:
        raise StageError(
            f"method.rank is {method.rank}, but the model's width is {width}, which is the highest possible rank. "
            "Lower the rank, or train the weights themselves with {name: full}."
        )
    settings = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rank_stabilized,
        use_dora=isinstance(method, Lora) and method.dora,
        target_modules="all-linear" if method.targets == "all-linear" else attention_layer_names(model),
        fan_in_fan_out=_has_transposed_layers(model),
        modules_to_save=_new_modules(model) or None,
        task_type="SEQ_CLS" if any(hasattr(model, name) for name in HEAD_NAMES) else "CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT expects the names of experts' layers that Transformers 4 used. Experts are not linear layers here, and
        # low-rank updates train the layers beside them.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        return get_peft_model(model, settings)


def _has_transposed_layers(model: "PreTrainedModel") -> bool:
    """Return whether a model's linear layers hold transposed matrices, as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _new_modules(model: "PreTrainedModel") -> list[str]:
    """Return the modules of a model that hold newly initialized weights: a head's, and a pooler that it reads."""
    prefix = f"{model.base_model_prefix}."
    return sorted(
        {
            (prefix if name.startswith(prefix) else "") + name.removeprefix(prefix).partition(".")[0]
            for name in new_weight_names(model)
        }
    )


def attention_layer_names(model: "PreTrainedModel") -> list[str]:
    """Return the full names of a model's linear layers in attention; raise StageError if no name says attention."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    linear = (name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
    names = [name for name in linear if "attn" in name.rpartition(".")[0] or "attention" in name.rpartition(".")[0]]
    if not names:
        raise StageError(
            f"this {model.config.model_type} model has no linear layer with attn or attention in its name; "
            "set method.targets to all-linear."
        )
    return names
