"""Access to the feed-forward layers of a model's blocks, for adapters and pruning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATED_MATRICES = ("gate_proj", "up_proj", "down_proj")  # of a feed-forward layer, named as in Llama


def feed_forwards(model: "PreTrainedModel") -> list[Any]:
    """Return each block's feed-forward layer; an empty list unless all are gated like Llama's."""
    body: Any = model.base_model
    layers = [getattr(block, "mlp", None) for block in getattr(body, "layers", ())]
    return layers if all(hasattr(layer, part) for layer in layers for part in GATED_MATRICES) else []
