"""A frozen model under a head: what it makes of a text is worked out once, however often its head is asked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import models
from tasks.common.modelling.models import HEADS
from tasks.common.settings import Numerics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


class Frozen:
    """A model of which only the head is trained, with the states that the head reads: one a row of token ids."""

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerFast", numerics: Numerics) -> None:
        self.model, self.tokenizer, self.numerics = model, tokenizer, numerics
        self.name = next(name for name in HEADS if hasattr(model, name))
        self.states: dict[tuple[int, ...], torch.Tensor] = {}  # each (d,)

    def outputs(self, rows: Sequence[Sequence[int]], together: int) -> "torch.Tensor":
        """Return what the head says of each row, shape (N, outputs), as `models.head_outputs` does."""
        import torch

        self.read(rows, together)
        states = torch.stack([self.states[tuple(row)] for row in rows])  # (N, d)
        with models.autocast(self.model, self.numerics):
            found: torch.Tensor = getattr(self.model, self.name)(states).float()
        return found

    def read(self, rows: Sequence[Sequence[int]], together: int) -> None:
        """Work out the states of the rows that are not known yet, `together` of them at a time."""
        import torch

        new = [row for row in dict.fromkeys(map(tuple, rows)) if row not in self.states]
        if not new:
            return
        head, was_training = getattr(self.model, self.name), self.model.training
        setattr(self.model, self.name, torch.nn.Identity())  # what Transformers then takes for outputs is what it reads
        try:
            with torch.no_grad():
                found = models.head_outputs(
                    self.model.eval(), self.tokenizer, [list(row) for row in new], self.numerics, together
                )
        finally:
            setattr(self.model, self.name, head)
            self.model.train(was_training)
        self.states |= zip(new, found, strict=True)
