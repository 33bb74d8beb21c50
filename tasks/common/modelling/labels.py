"""The labels of a classifier, from its Transformers config."""

from collections.abc import Mapping
from typing import Any


def is_text_classifier(config: Mapping[str, Any]) -> bool:
    """Return whether a model with a head gives a text one of several labels, or a number that it was trained on.

    A reward model has one output too, but no `problem_type`; it scores conversations and is not served.
    """
    architecture = str((config.get("architectures") or [""])[0])
    of_texts = architecture.endswith("ForSequenceClassification")
    return of_texts and (_is_regressor(config) or len(_names(config)) > 1)


def labels_of(config: Mapping[str, Any]) -> list[str] | None:
    """Return the labels in the order of the outputs; None for a regressor."""
    if _is_regressor(config):
        return None
    names = _names(config)
    return [str(names[key]) for key in sorted(names, key=int)]


def _is_regressor(config: Mapping[str, Any]) -> bool:
    return config.get("problem_type") == "regression" and len(_names(config)) <= 1


def _names(config: Mapping[str, Any]) -> Mapping[Any, Any]:
    """Return the labels by their index; without `id2label` in the config Transformers assumes two."""
    return config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
