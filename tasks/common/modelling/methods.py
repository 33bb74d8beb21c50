"""Fine-tuning methods by name: what each trains of a model, and how it becomes a plain Transformers model again.

`full` trains every weight; `top` the last blocks; `lora` low-rank updates (Hu et al. 2021) through PEFT, on request
with DoRA (Liu et al. 2024) and rank-stabilised scaling (Kalajdzievski 2023); `qlora` the same on a base of four-bit
NormalFloat weights (Dettmers et al. 2023); `adapter` a narrow feed-forward layer beside each block's own; `head` the
fresh head alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common.modelling import adapters
from tasks.common.modelling.models import HEADS
from tasks.common.settings import Settings
from tasks.common.stage import StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# What Transformers' models call their blocks and the norm above the last one: Llama's and ModernBERT's kin, GPT-2's,
# GPT-NeoX's, Phi's.
BLOCKS = ("layers", "h")
NORMS = ("norm", "final_norm", "ln_f", "final_layer_norm", "final_layernorm")


class Full(Settings):
    """Every weight is trained."""

    name: Literal["full"] = Field(description="Method")


class Top(Settings):
    """Only the last blocks, the final norm and the head are trained (and embeddings that are tied to it)."""

    name: Literal["top"] = Field(description="Method")
    layers: int = Field(description="Blocks to train, counted from the top", ge=1)


class LowRank(Settings):
    """Low-rank updates of linear layers are trained, through PEFT."""

    rank: int = Field(description="Rank of an update; at most the model's width", ge=1)
    alpha: int = Field(description="Scale of an update, divided by its rank", ge=1)
    dropout: float = Field(description="Share of an update's inputs that training hides", ge=0, lt=1)
    rank_stabilized: bool = Field(description="Divide the scale by the root of the rank instead (rsLoRA)")
    targets: Literal["all-linear", "attention"] = Field(description="Linear layers that get an update")


class Lora(LowRank):
    """Low-rank updates beside full-precision weights."""

    name: Literal["lora"] = Field(description="Method")
    dora: bool = Field(description="Train the weights' magnitudes apart from their directions (DoRA)")


class QLora(LowRank):
    """Low-rank updates beside a base in four bits, which takes a quarter of the memory; on a GPU only."""

    name: Literal["qlora"] = Field(description="Method")
    double_quantization: bool = Field(description="Quantize the four-bit weights' scales too (0.4 bits a weight less)")


class Adapter(Settings):
    """A narrow feed-forward layer beside each block's own is trained."""

    name: Literal["adapter"] = Field(description="Method")
    width: int = Field(description="Neurons of an adapter; the merged model's feed-forward layers grow by them", ge=1)


class Head(Settings):
    """Only the fresh head is trained: a linear layer on what the model, left as it is, makes of a text."""

    name: Literal["head"] = Field(description="Method")
    layers: int = Field(description="Blocks that are kept, from the bottom: upper ones foretell the next token", ge=1)
    pooling: Literal["model", "mean"] = Field(
        description="What the head reads: what the model's own classifier does (of a decoder the last token's state), "
        "or every token's state, its numbers averaged"
    )


Method = Full | Top | Lora | QLora | Adapter | Head


def apply(model: "PreTrainedModel", method: Method) -> "torch.nn.Module":
    """Return the model to train, with everything frozen that the method leaves alone; a fresh head is always trained.

    Raises StageError where the model has not what the method trains: so many blocks, such a width, such layers.
    """
    if isinstance(method, Top):
        _train_top(model, method)
    elif isinstance(method, Head):
        model.requires_grad_(False)
        _train_head(model)
    elif isinstance(method, Adapter):
        adapters.add(model, method.width)
        _train_head(model)
    elif isinstance(method, LowRank):
        return _with_updates(model, method)
    return model


def store_as_computed(model: "torch.nn.Module", method: Method, dtype: str) -> None:
    """Keep frozen linear layers in bfloat16 where autocast would make them so in each pass anyway.

    The products are the same bit for bit, the weights take half the memory, and no copies are kept for the backward
    pass. Not what is tied to the embedding, which is looked up in float32, nor what DoRA takes norms of. The model is
    then to be merged with a `base`.
    """
    import torch

    if dtype != "bfloat16" or not isinstance(method, Lora) or method.dora:
        return
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if (
            isinstance(module, torch.nn.Linear)
            and not module.weight.requires_grad
            and id(module.weight) not in looked_up
        ):
            module.to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:  # a view of the mapped file, all of which it would keep in memory
            parameter.data = parameter.data.clone()


def merge(model: Any, method: Method, base: Callable[[], "PreTrainedModel"] | None = None) -> "PreTrainedModel":
    """Return a plain Transformers model that holds what was trained.

    `base` loads what the training started from in full precision, to which low-rank updates are added: not to weights
    in four bits or two bytes taken back, because what these lack is no part of what was learnt (docs/decisions.md says
    what was measured). Without it they are added to the weights that they were trained beside.
    """
    if isinstance(method, Adapter):
        adapters.merge(model)
    if isinstance(method, LowRank) and base is not None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        updates = get_peft_model_state_dict(model, save_embedding_layers=False)
        model = _with_updates(base(), method)
        set_peft_model_state_dict(model, updates)
    plain: PreTrainedModel = model.merge_and_unload() if isinstance(method, LowRank) else model
    return plain


@contextmanager
def folded(model: Any, method: Method) -> Iterator[None]:
    """Within this, low-rank updates are part of the weights, for passes without gradients: no layer has more to do.

    The weights are put back as they were, to the bit. DoRA's updates, which are no sum, stay beside them.
    """
    if not isinstance(method, Lora) or method.dora:
        yield
        return
    import torch
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights: list[torch.nn.Parameter] = [layer.get_base_layer().weight for layer in layers]
    before = [weight.data for weight in weights]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                (name,) = layer.active_adapters
                weight.data = (weight.data.float() + layer.get_delta_weight(name).float()).to(weight.dtype)
        with model.disable_adapter():
            yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def load_four_bit(path: Path, method: QLora, attention: str) -> "PreTrainedModel":
    """Load a causal model onto the GPU, its linear layers in four bits; raise StageError without bitsandbytes."""
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise StageError(
            "finetune.method is qlora, which needs bitsandbytes: pip install -c requirements.lock -e '.[qlora]'."
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
    )
    return model


def _train_head(model: "PreTrainedModel") -> None:
    for name in HEADS:
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)


def _train_top(model: "PreTrainedModel", method: Top) -> None:
    body: Any = model.base_model
    blocks, norm = _part_of(body, BLOCKS), _part_of(body, NORMS)
    if blocks is None or norm is None:
        raise StageError(
            f"method top trains a model's last blocks (called {' or '.join(BLOCKS)}) and the norm above them "
            f"({' or '.join(NORMS)}), and {type(model).__name__} has no such names: take full, or lora."
        )
    if method.layers > len(blocks):
        raise StageError(f"method.layers is {method.layers}, but the model has {len(blocks)} blocks.")
    model.requires_grad_(False)
    above = [part for part in model.children() if part is not body]
    for part in (*blocks[-method.layers :], norm, *above):
        part.requires_grad_(True)


def _part_of(body: Any, names: Sequence[str]) -> Any:
    """Return the part of a model that has one of these names; None where none has."""
    return next((getattr(body, name) for name in names if hasattr(body, name)), None)


def _with_updates(model: "PreTrainedModel", method: LowRank) -> "torch.nn.Module":
    from peft import LoraConfig, get_peft_model

    width = model.config.hidden_size
    if method.rank > width:
        raise StageError(
            f"method.rank is {method.rank}, but the model's width is {width}, and no matrix of that width has "
            "a higher rank. Lower it, or train the weights themselves with {name: full}."
        )
    settings = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rank_stabilized,
        use_dora=isinstance(method, Lora) and method.dora,
        target_modules="all-linear" if method.targets == "all-linear" else attention_layers(model),
        task_type="SEQ_CLS" if any(hasattr(model, name) for name in HEADS) else "CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def attention_layers(model: "PreTrainedModel") -> list[str]:
    """Return the full names of the linear layers of a model's attention; raise StageError where none is called so."""
    import torch

    linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    found = [name for name in linear if "attn" in name.rpartition(".")[0] or "attention" in name.rpartition(".")[0]]
    if not found:
        raise StageError(
            f"no linear layer of this {model.config.model_type} model is called attention; "
            "set method.targets to all-linear."
        )
    return found
