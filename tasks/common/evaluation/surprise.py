"""How surprised a causal model is by text: as a loss, and of held-out text in bits a byte, which all tokenizers share.

Perplexity is of tokens, and another tokenizer has other tokens. The surprise of a text, summed over whatever tokens it
is cut into, is that of the text itself: divided by ln 2 and by its bytes in UTF-8 (Gao et al. 2020, "The Pile",
section 3.1). What begins and ends a text has no bytes and is not counted.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.text.shards import Split
from tasks.common.training import losses
from tasks.common.training.losses import Entropy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Rows = npt.NDArray[np.integer]  # (N, T) token ids
TOKENS = 4096  # in one forward pass, whose logits are as many numbers as tokens times the vocabulary


def bits_per_byte(split: Split, window: int, nats: Callable[[Rows], Sequence[float]]) -> float | None:
    """Return the bits a byte of a split's texts; None where it has no text.

    `nats` gives the summed surprise of each row's tokens after its first. The model sees up to `window` tokens at once.
    """
    size = int(split.bytes.sum())
    total = math.fsum(value for rows in pieces(split, window) for value in nats(rows))
    return round(total / math.log(2) / size, 4) if size else None


def pieces(split: Split, window: int) -> list[Rows]:
    """Return each text, from its start token on and without its end, as rows; those of one length lie together.

    A longer text is cut so that a piece begins with the last token of the one before: each of its tokens is asked once.
    """
    found: dict[int, list[Rows]] = defaultdict(list)
    for start, end in zip(split.documents[:-1].tolist(), (split.documents[1:] - 1).tolist(), strict=True):
        for place in range(start, end - 1, window - 1):
            piece = split.tokens[place : min(place + window, end)]
            found[len(piece)].append(piece)
    return [np.stack(found[length]) for length in sorted(found)]


def row_nats(logits: Any, ids: Any) -> list[float]:
    """Return the summed negative log-likelihood (nats) of each row from its logits (N, T, V) and ids (N, T)."""
    import torch

    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    sums: list[float] = loss.double().sum(1).tolist()
    return sums


def model_nats(model: "PreTrainedModel", rows: Rows) -> list[float]:
    """Return the summed negative log-likelihood (nats) of each row's tokens after its first, in float32."""
    import torch

    sums: list[float] = []
    together = max(1, TOKENS // rows.shape[1])
    with torch.no_grad():
        for start in range(0, len(rows), together):
            ids = torch.from_numpy(rows[start : start + together].astype(np.int64)).to(model.device)
            sums += row_nats(model(input_ids=ids).logits, ids)
    return sums


def windows_surprise(
    model: Any, ids: "torch.Tensor", numerics: Numerics, entropy: Entropy | None = None
) -> "torch.Tensor":
    """Return the summed cross-entropy (nats) of windows (B, T), each token after the first given those before it."""
    ids = ids.to(next(model.parameters()).device, non_blocking=True)
    with models.autocast(model, numerics):
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
    return losses.next_token(logits, ids, entropy)
