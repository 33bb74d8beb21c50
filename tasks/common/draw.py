"""Choices made by a hash, not by position or chance: the same thing gets the same answer in every run and order."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
ID_LENGTH = 16


def digest(*parts: str) -> str:
    """Return the sha256 of the parts in hex; a separator that text cannot hold keeps `a|bc` and `ab|c` apart."""
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def share(*parts: str) -> float:
    """Return a number in [0, 1) that only the parts decide."""
    return int(digest(*parts)[:12], 16) / 16**12


def number(*parts: str) -> int:
    """Return a whole number of 48 bits that only the parts decide."""
    return int(digest(*parts)[:12], 16)


def pick(choices: Sequence[T], *parts: str) -> T:
    """Return one of the choices."""
    return choices[number(*parts) % len(choices)]


def shuffled(items: Sequence[T], *parts: str) -> list[T]:
    """Return the items in an order that only the parts and the items' positions decide."""
    order = sorted(range(len(items)), key=lambda index: digest(*parts, str(index)))
    return [items[index] for index in order]


def split(heldout: float, *parts: str) -> str:
    """Return `heldout` for about that share of things, else `train`."""
    return "heldout" if share("split", *parts) < heldout else "train"


def short_id(*parts: str) -> str:
    """Return the id of a row: the head of the hash of its content."""
    return digest(*parts)[:ID_LENGTH]
