"""A causal model cut in two where only its last blocks are trained: what lies below them is computed once for all.

Both halves are made of the model's own modules, so that what one learns the whole has learnt.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE = (2, 8)  # rows and tokens on which the halves are held against the whole
TOLERANCE = 1e-4  # of logits


@dataclass(frozen=True)
class Halves:
    """A model's two halves: `upper(lower(ids))` is what the model says of `ids`."""

    lower: "PreTrainedModel"  # ids (B, T) to states (B, T, D), as `last_hidden_state`
    upper: "PreTrainedModel"  # states, given as `inputs_embeds`, to logits

    @classmethod
    def of(cls, model: "PreTrainedModel", layers: int) -> "Halves | None":
        """Cut a causal model below its last blocks, `layers` of them; None where its halves are not the whole.

        A model that does more to what it is given than its blocks do (GPT-2 adds positions, Gemma scales) is such a
        one. The halves are tried on a few tokens, because nothing in a model's config tells.
        """
        import torch

        body: Any = model.base_model
        lower, upper_body, upper = _sharing(body), _sharing(body), _sharing(model)
        setattr(upper, model.base_model_prefix, upper_body)
        ids = torch.arange(PROBE[0] * PROBE[1], device=model.device).reshape(PROBE) % model.config.vocab_size
        with torch.no_grad():
            try:
                lower.layers, upper_body.layers = body.layers[:-layers], body.layers[-layers:]
                lower.norm = torch.nn.Identity()
                states = lower(input_ids=ids, use_cache=False).last_hidden_state
                found = upper(inputs_embeds=states, use_cache=False).logits
            except (AttributeError, TypeError, ValueError):  # a model of another build
                return None
            whole = model(input_ids=ids, use_cache=False).logits
        return cls(lower, upper) if torch.allclose(found, whole, atol=TOLERANCE) else None


def _sharing(module: Any) -> Any:
    """Return a module of the same parts, of which some can be replaced without the first one's losing its own."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


def twin(model: "torch.nn.Module") -> Any:
    """Return a model that stays what this one is now: its trained weights copied, the frozen ones held by both."""
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    found = copy.deepcopy(model, dict(frozen))
    return found.eval().requires_grad_(False)
