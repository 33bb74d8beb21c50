"""What all Transformers folders under test have in common, whatever their model gives."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class TransformersFolder:
    """A model and its tokenizer, loaded from a Transformers folder; `bytes` is the size of its weights files."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    numerics: Numerics
    bytes: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return models.parameter_count(self.model)

    @property
    def context(self) -> int:
        """The longest input, in tokens; of a causal model the prompt and the reply together."""
        return int(self.tokenizer.model_max_length)

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens, which a text must not contain."""
        return chat.control_tokens(self.tokenizer)
