"""Rotary settings of models with one kind of attention.

Transformers 5 stores rotary settings by kind of attention (`full_attention`, `sliding_attention`). If they contain a
kind that no block of the model has, releases up to 5.5 mistake them for the old format, mix both formats, and reject
the result. So a ModernBERT with global attention only cannot be created, nor loaded from a Transformers 4 checkpoint.

Replaces: transformers.modeling_rope_utils.RotaryEmbeddingConfigMixin.standardize_rope_params (transformers 5.5)
Delete when: Transformers accepts `ModernBertConfig(layer_types=["full_attention"] * 22)`.
"""

from functools import cache
from typing import Any


@cache
def install() -> None:
    """Patch Transformers to drop the rotary settings of attention kinds that a model does not have."""
    from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

    original = RotaryEmbeddingConfigMixin.standardize_rope_params

    def standardize(config: Any) -> None:
        kinds, parameters = getattr(config, "layer_types", None), getattr(config, "rope_parameters", None)
        if kinds and parameters and all(isinstance(settings, dict) for settings in parameters.values()):
            config.rope_parameters = {kind: parameters[kind] for kind in parameters if kind in kinds} or parameters
        original(config)

    RotaryEmbeddingConfigMixin.standardize_rope_params = standardize
