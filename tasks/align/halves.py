"""A causal model split below its trained blocks, so that the frozen lower half is computed only once per iteration.

Both halves share the model's modules: an update of a half updates the model.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE_SHAPE = (2, 8)  # rows and tokens of the test that the halves match the model
LOGIT_TOLERANCE = 1e-4  # largest allowed difference of logits in that test


@dataclass(frozen=True)
class Halves:
    """A model's two halves: `upper(lower(ids))` equals `model(ids)`."""

    lower: "PreTrainedModel"  # ids (B, T) to states (B, T, D), as `last_hidden_state`
    upper: "PreTrainedModel"  # states, passed as `inputs_embeds`, to logits (B, T, V)

    @classmethod
    def of(cls, model: "PreTrainedModel", layers: int) -> "Halves | None":
        """Split a causal model below its last `layers` blocks; return None if the halves do not reproduce the model.

        That happens if the model changes its input embeddings before the first block (GPT-2 adds positions). The
        config does not say so; the halves are therefore compared with the model on a few tokens. Blocks of several
        kinds (Gemma's sliding and full attention) are not split: Transformers finds a block's kind by its position.
        """
        import torch

        if len(set(getattr(model.config.get_text_config(), "layer_types", None) or ())) > 1:
            return None
        body: Any = model.base_model
        lower, upper_body, upper = _shallow_copy(body), _shallow_copy(body), _shallow_copy(model)
        setattr(upper, model.base_model_prefix, upper_body)
        ids = (
            torch.arange(PROBE_SHAPE[0] * PROBE_SHAPE[1], device=model.device).reshape(PROBE_SHAPE)
            % model.config.vocab_size
        )
        with torch.no_grad():
            try:
                lower.layers, upper_body.layers = body.layers[:-layers], body.layers[-layers:]
                lower.norm = torch.nn.Identity()
                states = lower(input_ids=ids, use_cache=False).last_hidden_state
                upper_logits = upper(inputs_embeds=states, use_cache=False).logits
            except (AttributeError, TypeError, ValueError):  # a model without `layers` or `norm`
                return None
            model_logits = model(input_ids=ids, use_cache=False).logits
        return cls(lower, upper) if torch.allclose(upper_logits, model_logits, atol=LOGIT_TOLERANCE) else None


def _shallow_copy(module: Any) -> Any:
    """Return a copy of a module that shares its submodules; replacing one in the copy leaves the original unchanged."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


def frozen_copy(model: "torch.nn.Module") -> Any:
    """Return a frozen copy of a model: its trainable weights are copied, its frozen weights are shared."""
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    found = copy.deepcopy(model, dict(frozen))
    return found.eval().requires_grad_(False)
