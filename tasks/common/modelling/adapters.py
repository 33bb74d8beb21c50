"""Parallel bottleneck adapters that merge exactly: a narrow feed-forward layer beside each block's own.

He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning": an adapter that reads what the
feed-forward layer reads, and whose output is added to that layer's. Here it has the layer's own gated form,
`down(act(gate(x)) * up(x))` with `width` neurons, and so is `width` more neurons of that layer: to merge it is to
write them into its matrices, without a rest. The paper's fixed factor on the adapter's output is left to `down`.
"""

import copy
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import models
from tasks.common.modelling.models import GATED
from tasks.common.stage import StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def add(model: "PreTrainedModel", width: int) -> None:
    """Put an adapter beside each feed-forward layer, and freeze all else; at first they change nothing.

    Raises StageError for a model whose feed-forward layers are not gated ones with a matrix for each part.
    """
    import torch

    layers = models.feed_forwards(model)
    if not layers:
        raise StageError(
            f"finetune.method is adapter, but the feed-forward layers of this {model.config.model_type} model are not "
            f"gated ones with {', '.join(GATED)}, into which an adapter can be merged. Take {{name: lora, ...}}."
        )
    narrow = copy.deepcopy(model.config)
    narrow.intermediate_size = width
    model.requires_grad_(False)
    for layer in layers:
        adapter = type(layer)(narrow).to(layer.down_proj.weight)  # same class, device and type
        torch.nn.init.zeros_(adapter.down_proj.weight)
        if adapter.down_proj.bias is not None:
            torch.nn.init.zeros_(adapter.down_proj.bias)
        layer.adapter = adapter
        layer.adapter_hook = layer.register_forward_hook(_add_output)


def _add_output(layer: Any, inputs: tuple["torch.Tensor"], output: "torch.Tensor") -> "torch.Tensor":
    added: torch.Tensor = output + layer.adapter(*inputs)
    return added


def merge(model: "PreTrainedModel") -> None:
    """Write the adapters' neurons into the feed-forward layers, which grow by them."""
    import torch

    for layer in models.feed_forwards(model):
        adapter = layer.adapter
        layer.adapter_hook.remove()
        del layer.adapter, layer.adapter_hook
        for part, axis in zip(GATED, (0, 0, 1), strict=True):
            ours, more = getattr(layer, part), getattr(adapter, part)
            ours.weight = torch.nn.Parameter(torch.cat([ours.weight, more.weight], axis).detach())  # (out, in)
            if ours.bias is not None:
                bias = ours.bias + more.bias if part == "down_proj" else torch.cat([ours.bias, more.bias])
                ours.bias = torch.nn.Parameter(bias.detach())
            ours.out_features, ours.in_features = ours.weight.shape
        layer.intermediate_size = ours.in_features
    model.config.intermediate_size = ours.in_features
