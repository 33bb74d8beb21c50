"""How a causal model predicts given tokens: their log-probabilities, and whether each is the likeliest."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORED_TOKENS = 512  # whose probabilities over the whole vocabulary are in memory at once
SCORED_BATCH_TOKENS = 2048  # of rows that share a forward pass


class TokenScores(NamedTuple):
    """How a model predicted the last tokens of a row, each (tokens,)."""

    logp: npt.NDArray[np.float64]  # log-probability of the token, nats
    confidence: npt.NDArray[np.float64]  # probability of the likeliest token
    top: npt.NDArray[np.bool_]  # whether the token is the likeliest


def of_torch(
    model: "PreTrainedModel", rows: Sequence[Sequence[int]], firsts: Sequence[int], desc: str | None
) -> list[TokenScores]:
    """Return the scores of each row's tokens from position `first` (≥ 1) on.

    Rows of equal length share a forward pass, so no padding can have an effect.
    """
    import torch
    from tqdm import tqdm

    found: dict[int, TokenScores] = {}
    with torch.no_grad(), tqdm(total=len(rows), desc=desc, disable=desc is None, mininterval=2) as progress:
        for batch in _equal_lengths(rows):
            ids = torch.tensor([list(rows[index]) for index in batch], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            for place, index in enumerate(batch):
                found[index] = score_tokens(logits[place], ids[place], firsts[index])
            progress.update(len(batch))
    return [found[index] for index in range(len(rows))]


def of_engine(
    logits: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]], rows: Sequence[Sequence[int]],
    firsts: Sequence[int], desc: str | None,
) -> list[TokenScores]:  # fmt: skip
    """Return the scores of each row's tokens from position `first` (≥ 1) on.

    Rows run one at a time: with INT8 the scores of a row depend on the other rows of its batch.
    """
    import torch
    from tqdm import tqdm

    found = []
    for row, first in zip(tqdm(rows, desc=desc, disable=desc is None, mininterval=2), firsts, strict=True):
        ids = np.array([row], dtype=np.int64)
        found.append(score_tokens(torch.from_numpy(logits(ids)[0]), torch.from_numpy(ids[0]), first))
    return found


def _equal_lengths(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the indices of rows in batches of equal length, of SCORED_BATCH_TOKENS tokens at most."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    for length, indices in sorted(by_length.items()):
        size = max(SCORED_BATCH_TOKENS // length, 1)
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def score_tokens(logits: Any, ids: Any, first: int) -> TokenScores:
    """Return the scores of the ids (T,) from `first` on, from the logits (T, V) of their row."""
    import torch

    targets, parts = ids[first:], []
    for start in range(0, len(targets), SCORED_TOKENS):
        wanted = targets[start : start + SCORED_TOKENS]
        begin = first - 1 + start
        logp = torch.log_softmax(logits[begin : begin + len(wanted)].float(), -1)
        best, index = logp.max(-1)
        parts.append((logp.gather(1, wanted[:, None])[:, 0], best.exp(), index == wanted))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    return TokenScores(columns[0].astype(np.float64), columns[1].astype(np.float64), columns[2])
