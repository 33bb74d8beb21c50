"""What a judgement of answers is: the records of rankings, thumbs and flags, and what is checked of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving.errors import InputError, ServingError

FEWEST, MOST = 2, 6  # answers in a ranking
THUMBS, FLAGS = ("up", "down", "none"), ("flag", "unflag")  # the last of each takes it back
OPINIONS = (*THUMBS, *FLAGS)
NOTE_CHARACTERS = 500
ID = re.compile(r"[A-Za-z0-9_-]{8,64}")


class FeedbackError(ServingError):
    """The store of what people think cannot be opened, read or written."""


class Answer(NamedTuple):
    """One answer that this endpoint gave; `temperature` and `seed` say how it was drawn."""

    id: str
    prompt: list[dict[str, str]]
    text: str
    model: str
    temperature: float
    seed: int | None
    created: str


@dataclass(frozen=True)
class Ranking:
    """One person's order of several answers to one prompt: rank 1 is the best, equal ranks are ties, none is left out.

    `responses`, `ranks` and `models` belong together place by place, in the order in which the answers were shown;
    `models` holds model tags. `created` is UTC, in ISO 8601.
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
    """A thumb or a flag on one answer: of one annotator's thumbs on an answer the last one counts, of the flags too."""

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
    """Refuse an id that is none."""
    if not ID.fullmatch(value):
        raise InputError(f'"{field}" must be 8 to 64 letters, digits, "-" or "_"; got "{value[:64]}".', field=field)


def check_ranks(answers: Sequence[str], ranks: Sequence[int]) -> None:
    """Refuse ranks that do not order the answers; they are named by their ids."""
    if not FEWEST <= len(answers) <= MOST:
        raise InputError(f"A ranking has {FEWEST} to {MOST} answers; {len(answers)} were sent.", field="answers")
    if len(ranks) != len(answers):
        raise InputError(f"{len(answers)} answers need {len(answers)} ranks; got {len(ranks)}.", field="ranks")
    if len(set(answers)) < len(answers):
        raise InputError("One answer stands in the ranking twice.", field="answers")
    if min(ranks) != 1 or max(ranks) > len(ranks):
        found = ", ".join(map(str, ranks))
        raise InputError(f"Ranks go from 1, the best, to at most {len(ranks)}; got {found}.", field="ranks")


def check_opinion(opinion: str, note: str) -> None:
    """Refuse an opinion that is none, and a note that is too long."""
    if opinion not in OPINIONS:
        raise InputError(f'"opinion" must be one of {", ".join(OPINIONS)}; got "{opinion[:40]}".', field="opinion")
    if len(note) > NOTE_CHARACTERS:
        raise InputError(f'"note" has {len(note):,} characters; {NOTE_CHARACTERS} are allowed.', field="note")
