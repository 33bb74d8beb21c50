"""Classifiers under test: one interface for a torch model and for the INT8 files that will be served."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from serving import folders
from tasks.common.modelling import head_models, labels, models
from tasks.common.settings import Dtypes, Numerics
from tasks.common.text import chat
from tasks.evaluate.models_under_test import as_stage_error, read_size
from tasks.evaluate.transformers_folder import TransformersFolder

if TYPE_CHECKING:
    from serving.classification import ClassifierEngine

Floats = npt.NDArray[np.float32]
BATCH_ROWS = 32


class Classifier(Protocol):
    """A model with a head. `parameters` counts its parameters, `bytes` is the size of its weights file."""

    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def context(self) -> int:
        """The longest text, in tokens."""

    @property
    def labels(self) -> list[str] | None:
        """The labels in the order of the logits; None for a model that gives a number."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """The special tokens, which a text must not contain."""

    def encode(self, messages: Sequence[chat.Message]) -> list[int]:
        """Return the ids of a conversation up to its label."""

    def logits(self, rows: Sequence[list[int]]) -> Floats:
        """Return the logits (N, labels) of each row of ids."""


def open_classifier(path: Path, numerics: Numerics, template: str | None = None) -> Classifier:
    """Open a classifier's folder: an export of `quantize` with the serving engine, else a Transformers model."""
    if (path / folders.GRAPH_FILE).exists():
        return EngineClassifier.load(path, numerics)
    return TorchClassifier.load(path, numerics, template)


class TorchClassifier(TransformersFolder):
    """A Transformers model with a head, run in float32."""

    @classmethod
    def load(cls, path: Path, numerics: Numerics, template: str | None) -> "TorchClassifier":
        """Load model and tokenizer from a folder."""
        model = head_models.load_scorer(path, numerics, heads=None).eval()
        plain = numerics.model_copy(update={"dtype": Dtypes(decoder="float32", encoder="float32")})
        return cls(model, chat.load_tokenizer(path, template), plain, models.weight_bytes(path))

    @property
    def labels(self) -> list[str] | None:
        """The labels; None also for a reward model."""
        config = self.model.config.to_dict()
        return labels.labels_of(config) if labels.is_text_classifier(config) else None

    def encode(self, messages: Sequence[chat.Message]) -> list[int]:
        """Return the ids of a conversation up to its label."""
        return chat.encode_prompt(self.tokenizer, messages)

    def logits(self, rows: Sequence[list[int]]) -> Floats:
        """Return the logits (N, labels) of each row of ids."""
        import torch

        with torch.no_grad():
            outputs = head_models.head_outputs(self.model, self.tokenizer, rows, self.numerics, BATCH_ROWS)
        found: Floats = outputs.cpu().numpy()
        return found


@dataclass
class EngineClassifier:
    """The INT8 classifier, run by the serving engine: a text at a time, as the endpoint does."""

    engine: "ClassifierEngine"
    parameters: int
    bytes: int

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "EngineClassifier":
        """Open an export of `quantize`."""
        from serving.classification import ClassifierEngine

        with as_stage_error(f"the INT8 model in {path} cannot be opened"):
            return cls(ClassifierEngine(path, numerics.threads), *read_size(path))

    @property
    def context(self) -> int:
        """The longest text, in tokens."""
        return self.engine.context

    @property
    def labels(self) -> list[str] | None:
        """The labels; None for a regression model."""
        return self.engine.labels

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens, which a text must not contain."""
        return [token.content for token in self.engine.tokenizer.get_added_tokens_decoder().values() if token.special]

    def encode(self, messages: Sequence[chat.Message]) -> list[int]:
        """Return the ids of a conversation up to its label."""
        return self.engine.encode_messages(messages)

    def logits(self, rows: Sequence[list[int]]) -> Floats:
        """Return the logits (N, labels) of each row of ids."""
        return np.stack([self.engine.run(ids) for ids in rows])
