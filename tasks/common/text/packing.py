"""Conversations as rows of a forward pass: each in a row of its own, or several in one without sight of each other.

Packed rows are told apart by the attention mask (block-diagonal and causal) and by positions that begin anew with
each conversation, so that every token is computed as if its conversation stood alone (Krell et al. 2021, "Efficient
sequence packing without cross-contamination"). Which conversations share a row hangs on their batch alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.common.text import chat

if TYPE_CHECKING:
    import torch

Encoded = tuple[list[int], list[bool]]  # token ids, and whether each belongs to an answer that is learnt


@dataclass(frozen=True)
class Rows:
    """One forward pass: what the model is given, and at which of its tokens a loss is asked."""

    inputs: dict[str, "torch.Tensor"]  # the model's arguments; input_ids is (B, T)
    asked: "torch.Tensor"  # (B, T), true at the tokens of answers

    def on(self, device: Any) -> "Rows":
        """Return the same rows on a device."""
        return Rows({name: value.to(device) for name, value in self.inputs.items()}, self.asked.to(device))


def padded_rows(batch: Sequence[Encoded], fill: int) -> Iterator[Rows]:
    """Yield a batch with a row for each conversation, those of like length in one forward pass."""
    import torch

    for group in chat.alike([ids for ids, _ in batch]):
        rows, answers = zip(*(batch[i] for i in group), strict=True)
        ids, mask = chat.padded(rows, fill, "cpu")
        asked = torch.tensor(chat.pad(answers, False))
        yield Rows({"input_ids": ids, "attention_mask": mask}, asked)


def packed_rows(batch: Sequence[Encoded], longest: int, fill: int, *, in_one: bool = False) -> Iterator[Rows]:
    """Yield a batch with as many conversations in a row as fit into `longest` tokens; on request as one pass."""
    import torch

    bins = first_fit([len(ids) for ids, _ in batch], longest)
    rows = [[token for i in row for token in batch[i][0]] for row in bins]
    answers = [[asked for i in row for asked in batch[i][1]] for row in bins]
    positions = [[at for i in row for at in range(len(batch[i][0]))] for row in bins]
    owners = [[i for i in row for _ in batch[i][0]] for row in bins]
    for group in chat.alike(rows, len(rows) if in_one else chat.TOGETHER):
        ids, asked, at, owner = (
            torch.tensor(chat.pad([part[i] for i in group], value))  # (B, T)
            for part, value in ((rows, fill), (answers, False), (positions, 0), (owners, -1))
        )
        inputs = {"input_ids": ids, "attention_mask": block_mask(owner), "position_ids": at}
        yield Rows(inputs, asked)


def first_fit(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Return the places of items in bins of up to `longest`, each item in the first bin that has room for it.

    The long ones go first (first-fit decreasing, which needs at most 11/9 of the fewest bins: Johnson 1973). An item
    longer than `longest` gets a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        found = next((i for i, left in enumerate(room) if lengths[place] <= left), None)
        if found is None:
            bins.append([place])
            room.append(longest - lengths[place])
        else:
            bins[found].append(place)
            room[found] -= lengths[place]
    return bins


def block_mask(owner: "torch.Tensor") -> "torch.Tensor":
    """Return what is added to attention scores, (B, 1, T, T): 0 for what a token may read, the least number else.

    `owner` (B, T) says whose each token is. A token reads itself and the earlier ones of its own conversation; empty
    places read each other, because a row of scores that is the least number throughout would have no softmax.
    """
    import torch

    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    allowed = (owner[:, :, None] == owner[:, None, :]) & causal  # (B, T, T)
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
