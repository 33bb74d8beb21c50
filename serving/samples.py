"""Draw several different answers to one question, from one model or several, in an order that tells nothing."""

import secrets
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

from serving.decoding import Sampling
from serving.engine import Message
from serving.errors import InputError
from serving.judgements import FEWEST
from serving.package import Model

TRIES = 6  # draws for each answer that is asked for: models that are sure of themselves repeat themselves
SEEDS = 2**53  # JavaScript's whole numbers end there


class Sample(NamedTuple):
    """One answer that was drawn, in the order of the columns in which the store keeps it."""

    text: str
    model: str
    temperature: float
    seed: int


def draw(models: Sequence[Model], prompt: Sequence[Message], count: int, temperature: float) -> list[Sample]:
    """Return up to `count` answers that all say something else, the models in turn, shuffled.

    There are fewer where no more different ones come up; raise InputError where there are not even two. At temperature
    0 every model gives one answer.
    """
    found: dict[str, Sample] = {}
    turns = cycle(models)
    for _ in range(len(models) if temperature == 0 else count * TRIES):
        model = next(turns)
        seed = secrets.randbelow(SEEDS)
        text = model.text.generate(prompt, Sampling(temperature=temperature, seed=seed)).text.strip()
        if text:
            found.setdefault(" ".join(text.split()), Sample(text, model.tag, temperature, seed))
        if len(found) == count:
            break
    if len(found) < FEWEST:
        raise InputError(
            f"At temperature {temperature:g} this question got one and the same answer each time, so there is nothing "
            "to rank: raise the temperature or ask something else.",
            field="temperature", code="one_answer", status=409,
        )  # fmt: skip
    samples = list(found.values())
    secrets.SystemRandom().shuffle(samples)
    return samples
