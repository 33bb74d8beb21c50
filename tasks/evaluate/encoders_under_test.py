"""Masked models under test: one interface for a torch model and for the INT8 files that will be served."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from serving import folders
from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.text import chat
from tasks.evaluate.models_under_test import as_stage_error, read_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from serving.engine import EncoderLogits

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Encoder(Protocol):
    """A masked language model. `parameters` counts its parameters, `bytes` is the size of its weights file."""

    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def tokenizer(self) -> "Tokenizer": ...
    @property
    def special_ids(self) -> dict[str, int | None]:
        """The ids around a text and that of the mask token (`chat.special_ids`)."""

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """Return logits, shape (N, T, V), for token ids and attention mask, each (N, T)."""


def open_encoder(path: Path, numerics: Numerics) -> Encoder:
    """Open an encoder folder: an export of `quantize` with the serving engine, else a Transformers model."""
    return (EngineEncoder if (path / folders.GRAPH_FILE).exists() else TorchEncoder).load(path, numerics)


@dataclass
class TorchEncoder:
    """A Transformers masked model."""

    model: "PreTrainedModel"
    tokenizer: "Tokenizer"
    special_ids: dict[str, int | None]
    bytes: int

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "TorchEncoder":
        """Load model and tokenizer from a folder."""
        model, tokenizer = models.load_encoder(path, numerics).eval(), chat.load_tokenizer(path)
        return cls(model, tokenizer.backend_tokenizer, chat.special_ids(tokenizer), models.weight_bytes(path))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return models.parameter_count(self.model)

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """Return logits, shape (N, T, V), for token ids and attention mask, each (N, T)."""
        import torch

        device = self.model.device
        with torch.no_grad():
            out = self.model(
                input_ids=torch.as_tensor(ids, device=device), attention_mask=torch.as_tensor(mask, device=device)
            )
        result: Floats = out.logits.float().cpu().numpy()
        return result


@dataclass
class EngineEncoder:
    """The INT8 encoder, run by the serving engine."""

    logits: "EncoderLogits"
    tokenizer: "Tokenizer"
    special_ids: dict[str, int | None]
    parameters: int
    bytes: int

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "EngineEncoder":
        """Open an export of `quantize`."""
        from serving.engine import EncoderLogits

        with as_stage_error(f"the INT8 model in {path} cannot be opened"):
            special_ids = folders.read_json(path / folders.SPECIAL_TOKENS_FILE)
            logits, tokenizer = EncoderLogits(path, numerics.threads), folders.load_tokenizer(path)
            return cls(logits, tokenizer, special_ids, *read_size(path))
