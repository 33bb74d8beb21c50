"""Sample several different answers to one question, from one or more models, in random order."""

import secrets
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

from serving.decoding import Sampling
from serving.engine import Message
from serving.errors import InputError
from serving.feedback.judgements import MIN_ANSWERS
from serving.package import Model

MAX_DRAWS_PER_ANSWER = 6  # confident models repeat their answers
SEED_LIMIT = 2**53  # JavaScript's integers are exact below it


class Sample(NamedTuple):
    """One sampled answer; the fields are in the order of the store's columns."""

    text: str
    model: str
    temperature: float
    seed: int


def sample_answers(models: Sequence[Model], prompt: Sequence[Message], count: int, temperature: float) -> list[Sample]:
    """Return up to `count` different answers, sampled from the models in turn and shuffled.

    Fewer are returned if the models repeat themselves; raise InputError if there are not two. At temperature 0 each
    model gives one answer.
    """
    by_text: dict[str, Sample] = {}
    model_cycle = cycle(models)
    for _ in range(len(models) if temperature == 0 else count * MAX_DRAWS_PER_ANSWER):
        model = next(model_cycle)
        seed = secrets.randbelow(SEED_LIMIT)
        text = model.text.generate(prompt, Sampling(temperature=temperature, seed=seed)).text.strip()
        if text:
            by_text.setdefault(" ".join(text.split()), Sample(text, model.tag, temperature, seed))
        if len(by_text) == count:
            break
    if len(by_text) < MIN_ANSWERS:
        raise InputError(
            f"At temperature {temperature:g} this question always got the same answer, so there is nothing to rank: "
            "raise the temperature or ask another question.",
            field="temperature", code="one_answer", status=409,
        )  # fmt: skip
    samples = list(by_text.values())
    secrets.SystemRandom().shuffle(samples)
    return samples
