"""Batches of conversations: one per row with padding, or several packed into a row without attention between them.

In a packed row the attention mask is block-diagonal and causal, and positions restart with each conversation, so every
token is computed as if its conversation were alone (Krell et al. 2021, "Efficient sequence packing without
cross-contamination"). The packing depends only on the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.common.text import chat

if TYPE_CHECKING:
    import torch

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
    owners = [[i for i in row for _ in batch[i][0]] for row in bins]
    for group in chat.length_buckets(rows, len(rows) if single_pass else chat.MICROBATCH_ROWS):
        ids, loss_mask, position, owner = (
            torch.tensor(chat.pad([part[i] for i in group], value))  # (B, T)
            for part, value in ((rows, pad_id), (answers, False), (positions, 0), (owners, -1))
        )
        inputs = {"input_ids": ids, "attention_mask": block_mask(owner), "position_ids": position}
        yield Rows(inputs, loss_mask)


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


def block_mask(owner: "torch.Tensor") -> "torch.Tensor":
    """Return the additive attention mask (B, 1, T, T): 0 where a token may attend, else the smallest float32.

    `owner` (B, T) is the conversation of each token, -1 at padding. A token attends to itself and the earlier tokens
    of its conversation. Padding attends to padding, because softmax of a fully masked row is undefined.
    """
    import torch

    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    allowed = (owner[:, :, None] == owner[:, None, :]) & causal  # (B, T, T)
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
