"""Negative log-likelihood of text under a causal model: as a loss, and in bits per byte for held-out text.

Perplexity is per token, so it cannot be compared between tokenizers. Bits per byte can: the summed negative
log-likelihood of a text, divided by ln 2 and by its length in UTF-8 bytes (Gao et al. 2020, "The Pile", section 3.1).
BOS and EOS have no bytes and are not counted.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.text import chat
from tasks.common.text.shards import Split
from tasks.common.training import losses
from tasks.common.training.losses import Loss

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TokenRows = npt.NDArray[np.integer]  # (N, T) token ids
BATCH_TOKENS = 4096  # in one forward pass; its logits hold this many times the vocabulary numbers


def bits_per_byte(split: Split, window: int, row_nll_fn: Callable[[TokenRows], Sequence[float]]) -> float | None:
    """Return the bits per byte of a split's texts; None if it has no text.

    `row_nll_fn` returns the summed negative log-likelihood (nats) of each row's tokens after its first. The model sees
    up to `window` tokens at once.
    """
    size = int(split.bytes.sum())
    total = math.fsum(value for rows in text_windows(split, window) for value in row_nll_fn(rows))
    return round(total / math.log(2) / size, 4) if size else None


def text_windows(split: Split, window: int) -> list[TokenRows]:
    """Return each text, with BOS and without EOS, as rows of up to `window` tokens, grouped by length.

    Consecutive windows of a long text overlap by one token, so that every token is predicted exactly once.
    """
    by_length: dict[int, list[TokenRows]] = defaultdict(list)
    for start, end in zip(split.documents[:-1].tolist(), (split.documents[1:] - 1).tolist(), strict=True):
        for first in range(start, end - 1, window - 1):
            row = split.tokens[first : min(first + window, end)]
            by_length[len(row)].append(row)
    return [np.stack(by_length[length]) for length in sorted(by_length)]


def row_nll(logits: Any, ids: Any) -> list[float]:
    """Return the summed negative log-likelihood (nats) of each row from its logits (N, T, V) and ids (N, T)."""
    import torch

    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    sums: list[float] = loss.double().sum(1).tolist()
    return sums


def model_nll(
    model: "PreTrainedModel", rows: TokenRows, progress: Callable[[int], object] | None = None
) -> list[float]:
    """Return the summed negative log-likelihood (nats) of each row's tokens after its first, in float32.

    `progress` is called with the number of rows after each forward pass.
    """
    import torch

    sums: list[float] = []
    batch_size = max(1, BATCH_TOKENS // rows.shape[1])
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            ids = torch.from_numpy(rows[start : start + batch_size].astype(np.int64)).to(model.device)
            sums += row_nll(model(input_ids=ids).logits, ids)
            if progress:
                progress(len(ids))
    return sums


def answers_mean_nll(
    model: Any, encoded: Sequence[tuple[Sequence[int], Sequence[bool]]], pad_id: int, numerics: Numerics
) -> float | None:
    """Return the mean negative log-likelihood (nats per token) of the masked tokens of (ids, mask); None without any.

    The first token of a row is predicted from nothing and does not count.
    """
    import torch

    device, total, count = next(model.parameters()).device, 0.0, 0
    with torch.no_grad():
        for part in chat.length_buckets([ids for ids, _ in encoded]):
            ids, attention = chat.pad_batch([encoded[index][0] for index in part], pad_id, device)
            wanted = torch.tensor(chat.pad([encoded[index][1] for index in part], False), device=device)[:, 1:]
            with models.autocast(model, numerics):
                logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
            logp = torch.log_softmax(logits[:, :-1][wanted].float(), -1)
            total -= float(logp.gather(1, ids[:, 1:][wanted][:, None]).sum())
            count += int(wanted.sum())
    return total / count if count else None


def windows_nll(model: Any, ids: "torch.Tensor", numerics: Numerics, loss: Loss | None = None) -> "torch.Tensor":
    """Return the summed next-token cross-entropy (nats, a scalar tensor) of windows of token ids (B, T)."""
    ids = ids.to(next(model.parameters()).device, non_blocking=True)
    with models.autocast(model, numerics):
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
    return losses.next_token(logits, ids, loss)
