"""Parallel bottleneck adapters that merge exactly: a narrow feed-forward layer beside each block's own.

He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning": the adapter has the same input as the
feed-forward layer, and its output is added to the layer's output. Here it has the layer's gated form,
`down(act(gate(x)) * up(x))` with `width` neurons. It is therefore equivalent to `width` more neurons of the layer, and
merging concatenates the matrices. The paper's fixed scale of the adapter's output is absorbed by `down`.
"""

import copy
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError
from tasks.common.modelling.feed_forwards import GATED_MATRICES, feed_forwards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def add(model: "PreTrainedModel", width: int) -> None:
    """Add an adapter to each feed-forward layer and freeze all other weights; its output is 0 at first.

    Raises StageError if the model's feed-forward layers are not gated ones with the matrices `GATED_MATRICES`.
    """
    import torch

    layers = feed_forwards(model)
    if not layers:
        raise StageError(
            f"finetune.method is adapter, which needs gated feed-forward layers with {', '.join(GATED_MATRICES)}, and "
            f"the layers of this {model.config.model_type} model have another form. Use {{name: lora, ...}}."
        )
    narrow = copy.deepcopy(model.config)
    narrow.intermediate_size = width
    model.requires_grad_(False)
    for layer in layers:
        adapter = type(layer)(narrow).to(layer.down_proj.weight)  # same class, device and dtype
        torch.nn.init.zeros_(adapter.down_proj.weight)
        if adapter.down_proj.bias is not None:
            torch.nn.init.zeros_(adapter.down_proj.bias)
        layer.adapter = adapter
        layer.adapter_hook = layer.register_forward_hook(_add_adapter_output)


def _add_adapter_output(layer: Any, inputs: tuple["torch.Tensor"], output: "torch.Tensor") -> "torch.Tensor":
    added: torch.Tensor = output + layer.adapter(*inputs)
    return added


def merge(model: "PreTrainedModel") -> None:
    """Merge the adapters into the feed-forward layers, which get wider by the adapters' neurons."""
    import torch

    for layer in feed_forwards(model):
        adapter = layer.adapter
        layer.adapter_hook.remove()
        del layer.adapter, layer.adapter_hook
        for name, axis in zip(GATED_MATRICES, (0, 0, 1), strict=True):
            matrix, addition = getattr(layer, name), getattr(adapter, name)
            matrix.weight = torch.nn.Parameter(torch.cat([matrix.weight, addition.weight], axis).detach())  # (out, in)
            if matrix.bias is not None:
                bias = matrix.bias + addition.bias if name == "down_proj" else torch.cat([matrix.bias, addition.bias])
                matrix.bias = torch.nn.Parameter(bias.detach())
            matrix.out_features, matrix.in_features = matrix.weight.shape
        layer.intermediate_size = matrix.in_features
    model.config.intermediate_size = matrix.in_features
