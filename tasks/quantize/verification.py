"""Comparison of an export with the model in PyTorch: a wrong graph is refused, not served.

A tracer keeps the branch that its example takes and knows no other: windows, soft-caps, position scalings and expert
choices may be lost without an error.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.common.harness.job import StageError
from tasks.common.random_streams import Stream, generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (1, 8, 48, 320)  # of the compared texts in tokens, as far as the context allows
MAX_DIFFERENCE = 1e-2  # of logits, relative to their standard deviation; float32 sums in another order differ by 1e-5
MIN_DEVIATION = 1e-3  # of logits: a head that gives every text the same has none
CLASSIFIER_TEXTS = 8  # of each length, because one text has only a few outputs
DECODED_TOKENS = 24


def probe_ids(length: int, vocabulary: int, texts: int = 1) -> Any:
    """Return texts of random token ids (texts, length)."""
    return generator(length, Stream.SPEED_PROMPT).integers(vocabulary, size=(texts, length))


def check_float32(
    model: "PreTrainedModel", logits: Callable[[Any], Any], context: int, tokens: int, texts_per_length: int = 1
) -> float:
    """Return the largest difference of an export's float32 logits from the model's, rounded up to a power of ten.

    The unit is the standard deviation of the logits over the texts of a length: several texts for a model with few
    outputs. `logits` runs the export on ids (1, T); `tokens` is the size of the tokenizer. Raises StageError if the
    difference exceeds MAX_DIFFERENCE.
    """
    import torch

    largest = 0.0
    for length in sorted({min(length, context) for length in LENGTHS}):
        texts = np.split(probe_ids(length, tokens, texts_per_length), texts_per_length)
        with torch.no_grad():
            expected = np.stack([model(input_ids=torch.from_numpy(ids)).logits.float().numpy() for ids in texts])
        found = np.stack([logits(ids) for ids in texts])
        difference = float(np.abs(found - expected).max() / max(expected.std(), MIN_DEVIATION))
        if not difference <= MAX_DIFFERENCE:
            raise StageError(
                f"the export of this {model.config.model_type} model computes other logits than PyTorch: in a text of "
                f"{length} tokens they differ by {difference:.2g} standard deviations in float32, and "
                f"{MAX_DIFFERENCE:g} are allowed. Nothing was written; use another model for serving."
            )
        largest = max(largest, difference)
    return 10.0 ** math.ceil(math.log10(largest)) if largest else 0.0


def check_engine(path: Path, threads: int, context: int, tokens: int) -> None:
    """Raise StageError if the serving engine chooses tokens that the exported graph finds unlikely.

    The engine replaces the graph's attention by its own, with a paged cache.
    """
    from serving.engine import DecoderLogits, TextEngine

    engine, logits = TextEngine(path, threads), DecoderLogits(path, threads)
    for length in sorted({min(length, max(1, context - DECODED_TOKENS)) for length in LENGTHS}):
        ids = probe_ids(length, tokens)
        chosen = engine.decode(ids[0].tolist(), min(DECODED_TOKENS, context - length))
        whole = np.concatenate([ids, [chosen]], 1)
        expected = logits(whole)[0, length - 1 : -1]  # (N, V)
        taken = np.take_along_axis(expected, np.array(chosen)[:, None], -1)[:, 0]
        gap = float((expected.max(-1) - taken).max() / expected.std())
        if not gap <= MAX_DIFFERENCE:
            raise StageError(
                f"the serving engine generates other tokens than the exported model computes (after {length} tokens "
                f"one is {gap:.2g} standard deviations below the best): use another model for serving."
            )
