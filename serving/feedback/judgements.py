"""Records of human judgements (rankings, thumbs, flags) and their validation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving.errors import InputError, ServingError

MIN_ANSWERS, MAX_ANSWERS = 2, 6  # answers per ranking
THUMBS, FLAGS = ("up", "down", "none"), ("flag", "unflag")  # the last value of each withdraws it
OPINIONS = (*THUMBS, *FLAGS)
MAX_NOTE_CHARACTERS = 500
ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{8,64}")


class FeedbackError(ServingError):
    """The feedback store cannot be opened, read or written."""


class Answer(NamedTuple):
    """One answer that this endpoint generated, with the `temperature` and `seed` it was sampled with."""

    id: str
    prompt: list[dict[str, str]]
    text: str
    model: str
    temperature: float
    seed: int | None
    created: str


@dataclass(frozen=True)
class Ranking:
    """One annotator's ranking of the answers to one prompt: rank 1 is the best, equal ranks are ties, without gaps.

    `responses`, `ranks` and `models` (model tags) are parallel lists in the order in which the answers were shown.
    `created` is UTC, in ISO 8601.
    """

    number: int
    id: str
    prompt: list[dict[str, str]]
    responses: list[str]
    ranks: list[int]
    models: list[str]
    annotator: str
    created: str


@dataclass(frozen=True)
class Opinion:
    """A thumb or a flag on one answer. Per annotator and answer, the last thumb and the last flag count."""

    number: int
    id: str
    prompt: list[dict[str, str]]
    response: str
    model: str
    opinion: str
    note: str
    annotator: str
    created: str


def check_id(field: str, value: str) -> None:
    """Raise InputError if an id is malformed."""
    if not ID_PATTERN.fullmatch(value):
        raise InputError(f'"{field}" must be 8 to 64 letters, digits, "-" or "_"; got "{value[:64]}".', field=field)


def check_ranks(answers: Sequence[str], ranks: Sequence[int]) -> None:
    """Raise InputError if the ranks are not a ranking of the answers, which are given by their ids."""
    if not MIN_ANSWERS <= len(answers) <= MAX_ANSWERS:
        raise InputError(
            f"A ranking has {MIN_ANSWERS} to {MAX_ANSWERS} answers; {len(answers)} were sent.", field="answers"
        )
    if len(ranks) != len(answers):
        raise InputError(f"{len(answers)} answers need {len(answers)} ranks; got {len(ranks)}.", field="ranks")
    if len(set(answers)) < len(answers):
        raise InputError("The ranking contains one answer twice.", field="answers")
    if min(ranks) != 1 or max(ranks) > len(ranks):
        found = ", ".join(map(str, ranks))
        raise InputError(f"Ranks go from 1, the best, to at most {len(ranks)}; got {found}.", field="ranks")


def check_opinion(opinion: str, note: str) -> None:
    """Raise InputError if an opinion is unknown or its note too long."""
    if opinion not in OPINIONS:
        raise InputError(f'"opinion" must be one of {", ".join(OPINIONS)}; got "{opinion[:40]}".', field="opinion")
    if len(note) > MAX_NOTE_CHARACTERS:
        raise InputError(f'"note" has {len(note):,} characters; {MAX_NOTE_CHARACTERS} are allowed.', field="note")
