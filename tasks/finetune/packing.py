"""Batches of conversations: one per row with padding, or several packed into a row without attention between them.

In a packed row positions restart with each conversation. Transformers makes each block's attention mask from them:
causal within a conversation, and within the window of a sliding one, so that every token is computed as if its
conversation were alone (Krell et al. 2021, "Efficient sequence packing without cross-contamination"). A model for which
that does not hold is refused (`check_packing`). The packing depends only on the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.text import chat

if TYPE_CHECKING:
    import torch

PROBE_LENGTHS, PROBE_STEP = (
    (7, 11, 5),
    37,
)  # the conversations of `check_packing` (tokens), and a step between their ids
# Largest difference of logits, in standard deviations: of float32 sums in another order, and of bfloat16 products.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}

Encoded = tuple[list[int], list[bool]]  # token ids, and their loss mask: true at answer tokens to be trained on


@dataclass(frozen=True)
class Rows:
    """One forward pass: the model's arguments and the loss mask."""

    inputs: dict[str, "torch.Tensor"]  # the model's arguments; input_ids is (B, T)
    loss_mask: "torch.Tensor"  # (B, T), true at answer tokens

    def to(self, device: Any) -> "Rows":
        """Return the rows on a device."""
        return Rows({name: value.to(device) for name, value in self.inputs.items()}, self.loss_mask.to(device))


def padded_rows(batch: Sequence[Encoded], pad_id: int) -> Iterator[Rows]:
    """Yield a batch with one conversation per row, in forward passes of similar length."""
    import torch

    for group in chat.length_buckets([ids for ids, _ in batch]):
        rows, answers = zip(*(batch[i] for i in group), strict=True)
        ids, mask = chat.pad_batch(rows, pad_id, "cpu")
        loss_mask = torch.tensor(chat.pad(answers, False))
        yield Rows({"input_ids": ids, "attention_mask": mask}, loss_mask)


def packed_rows(batch: Sequence[Encoded], max_tokens: int, pad_id: int, *, single_pass: bool = False) -> Iterator[Rows]:
    """Yield a batch with conversations packed into rows of `max_tokens`; with `single_pass` in one forward pass."""
    import torch

    bins = first_fit([len(ids) for ids, _ in batch], max_tokens)
    rows = [[token for i in row for token in batch[i][0]] for row in bins]
    answers = [[flag for i in row for flag in batch[i][1]] for row in bins]
    positions = [[at for i in row for at in range(len(batch[i][0]))] for row in bins]
    for group in chat.length_buckets(rows, len(rows) if single_pass else chat.MICROBATCH_ROWS):
        ids, loss_mask, position = (
            torch.tensor(chat.pad([part[i] for i in group], value))  # (B, T); each padding token is a row of its own
            for part, value in ((rows, pad_id), (answers, False), (positions, 0))
        )
        yield Rows({"input_ids": ids, "position_ids": position}, loss_mask)


def check_packing(model: Any, numerics: Numerics) -> None:
    """Raise StageError if a model computes a conversation in a packed row otherwise than alone."""
    import torch

    config, was_training = model.config.get_text_config(), model.training
    device = next(model.parameters()).device
    ids = (torch.arange(sum(PROBE_LENGTHS), device=device) * PROBE_STEP % config.vocab_size)[None]  # (1, T)
    positions = torch.cat([torch.arange(length, device=device) for length in PROBE_LENGTHS])[None]
    model.eval()
    with torch.no_grad(), models.autocast(model, numerics):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        alone = [model(input_ids=part[None], use_cache=False).logits[0] for part in ids[0].split(PROBE_LENGTHS)]
    model.train(was_training)
    difference = (packed - torch.cat(alone)).abs().max() / packed.std()
    tolerance = PROBE_TOLERANCE[models.dtype_of(model, numerics)]
    if not difference <= tolerance:
        raise StageError(
            f"task.packing: a {config.model_type} model computes a conversation in a packed row otherwise than alone "
            f"(the logits differ by {difference:.2g} standard deviations, and {tolerance:g} are allowed): set "
            "task.packing to null."
        )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of item indices by first-fit decreasing: each item goes into the first bin with room, longest first.

    It uses at most 11/9 of the optimal number of bins, asymptotically (Johnson 1973). An item longer than `capacity`
    gets a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        bin_index = next((i for i, left in enumerate(room) if lengths[item] <= left), None)
        if bin_index is None:
            bins.append([item])
            room.append(capacity - lengths[item])
        else:
            bins[bin_index].append(item)
            room[bin_index] -= lengths[item]
    return bins
