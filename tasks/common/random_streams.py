"""All random streams of the stages: every generator is derived from a run's seed, a stream and an index.

Lists of numbers as seeds collided: `[seed, 2]` was one stage's generator and another stage's epoch 2, and numpy pads
short lists with zeros, so `[seed]` equals `[seed, 0]`. Here the stream and the index are the `spawn_key` of a
SeedSequence, which numpy hashes separately from the seed and whose length matters.
"""

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MAX_INDEX = 2**32  # numpy splits larger numbers into several words, which could equal another index


class Stream(IntEnum):
    """The random streams. Never reuse a number for another stream: earlier runs could not be reproduced."""

    INITIAL_WEIGHTS = 1  # and all other uses of torch's global generator before training
    DROPOUT = 2  # index: step, process
    ITEM_ORDER = 3  # index: epoch
    WINDOWS = 4  # index: kind of text, epoch
    DOCUMENTS = 5  # index: epoch
    MASKED_TOKENS = 6  # index: step
    WORD_DROPOUT = 7  # of rankings; index: step
    HEAD_RANKINGS = 8  # the training rankings of each reward model head
    HELDOUT_SAMPLE = 9  # of the conversations that fine-tuning is measured on
    PROMPTS = 10  # of an alignment; index: iteration
    ROLLOUTS = 11  # index: iteration, process
    MINIBATCHES = 12  # index: iteration
    TRL_TRAINER = 13  # index: iteration
    ALARM_REPLIES = 14
    PRUNING_PROMPTS = 15
    PRUNING_REPLIES = 16
    PRUNING_BATCHES = 17  # index: step
    QUESTIONS = 18  # replies of an evaluation
    SAMPLES = 19
    CONTINUATIONS = 20
    REPLY_BATCH = 21  # within one call that samples replies; index: batch
    REPLY = 22  # within one call that samples replies one by one; index: prompt
    BOOTSTRAP = 23
    SPEED_PROMPT = 24
    MATRIX_PRODUCT = 25
    OVERLAP = 26  # replies of an evaluation
    ABSTENTION = 27


def _sequence(seed: int, stream: Stream, index: tuple[int, ...]) -> np.random.SeedSequence:
    if not all(0 <= number < MAX_INDEX for number in index):
        raise ValueError(f"the index of {stream.name} is {index}; expected numbers from 0 to {MAX_INDEX - 1}")
    return np.random.SeedSequence(seed, spawn_key=(stream, *index))


def generator(seed: int, stream: Stream, *index: int) -> np.random.Generator:
    """Return the numpy generator of a stream at an index; raise ValueError if the index is out of range."""
    return np.random.default_rng(_sequence(seed, stream, index))


def derive_seed(seed: int, stream: Stream, *index: int) -> int:
    """Return a 63-bit seed for other generators than numpy's, or for the streams within one call."""
    return int(_sequence(seed, stream, index).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(device: str, seed: int, stream: Stream, *index: int) -> "torch.Generator":
    """Return a torch generator on a device."""
    import torch

    return torch.Generator(device).manual_seed(derive_seed(seed, stream, *index))


def seed_torch(seed: int, stream: Stream, *index: int, device: str | None = None) -> None:
    """Seed torch's global generators: those of the CPU and of `device`, or those of all devices.

    Training steps pass the device, because `torch.manual_seed` takes 0.4 ms for GPUs that are not in use.
    """
    import torch

    derived = derive_seed(seed, stream, *index)
    if device is None:
        torch.manual_seed(derived)
        return
    torch.default_generator.manual_seed(derived)
    if device == "cuda":
        torch.cuda.manual_seed(derived)
