"""A frozen backbone under a trained head: the hidden state of each text is computed once and cached."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError
from tasks.common.modelling import head_models, models
from tasks.common.modelling.head_models import HEAD_NAMES
from tasks.common.settings import Numerics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


class FrozenBackbone:
    """A model of which only the head is trained, with a cache of the head's inputs by row of token ids."""

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerFast", numerics: Numerics) -> None:
        self.model, self.tokenizer, self.numerics = model, tokenizer, numerics
        self.head_name = next(name for name in HEAD_NAMES if hasattr(model, name))
        _check_head(model, self.head_name)
        self.states: dict[tuple[int, ...], torch.Tensor] = {}  # each (d,)

    def outputs(self, rows: Sequence[Sequence[int]], batch_size: int, desc: str | None = None) -> "torch.Tensor":
        """Return the head's outputs for each row, shape (N, outputs), as `head_models.head_outputs` does."""
        import torch

        self.cache_states(rows, batch_size, desc)
        states = torch.stack([self.states[tuple(row)] for row in rows])  # (N, d)
        with models.autocast(self.model, self.numerics):
            outputs: torch.Tensor = getattr(self.model, self.head_name)(states).float()
        return outputs

    def cache_states(self, rows: Sequence[Sequence[int]], batch_size: int, desc: str | None = None) -> None:
        """Compute the states of rows that are not in the cache, `batch_size` rows at a time."""
        import torch

        new = [row for row in dict.fromkeys(map(tuple, rows)) if row not in self.states]
        if not new:
            return
        head, was_training = getattr(self.model, self.head_name), self.model.training
        setattr(self.model, self.head_name, torch.nn.Identity())  # so that Transformers returns the head's inputs
        try:
            with torch.no_grad():
                found = head_models.head_outputs(
                    self.model.eval(), self.tokenizer, [list(row) for row in new], self.numerics, batch_size, desc
                )
        finally:
            setattr(self.model, self.head_name, head)
            self.model.train(was_training)
        self.states |= zip(new, found, strict=True)


def _check_head(model: Any, head_name: str) -> None:
    """Raise StageError if new weights lie below the head, or if it is no single layer: they would stay untrained."""
    import torch

    below = [name for name in head_models.new_weight_names(model) if not name.startswith(f"{head_name}.")]
    if below or not isinstance(getattr(model, head_name), torch.nn.Linear):
        raise StageError(
            f"method head trains one new linear layer, and the head of a {type(model).__name__} has more new weights: "
            "set method.pooling to mean, or use the method top_layers or full."
        )
