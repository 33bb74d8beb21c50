"""Deterministic choices by hash: the result depends only on the parts, not on order, position or a random state."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
ID_LENGTH = 16


def digest(*parts: str) -> str:
    """Return the sha256 of the parts in hex, joined by NUL so that ("a", "bc") and ("ab", "c") differ."""
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def uniform(*parts: str) -> float:
    """Return a uniformly distributed number in [0, 1)."""
    return int(digest(*parts)[:12], 16) / 16**12


def number(*parts: str) -> int:
    """Return a uniformly distributed 48-bit integer."""
    return int(digest(*parts)[:12], 16)


def pick(choices: Sequence[T], *parts: str) -> T:
    """Return one of the choices, uniformly distributed."""
    return choices[number(*parts) % len(choices)]


def shuffled(items: Sequence[T], *parts: str) -> list[T]:
    """Return the items shuffled. The order depends only on the parts and the number of items."""
    order = sorted(range(len(items)), key=lambda index: digest(*parts, str(index)))
    return [items[index] for index in order]


def split(heldout: float, *parts: str) -> str:
    """Return `heldout` with probability `heldout`, else `train`."""
    return "heldout" if uniform("split", *parts) < heldout else "train"


def short_id(*parts: str) -> str:
    """Return a row's id: the first `ID_LENGTH` hex digits of the hash of its content."""
    return digest(*parts)[:ID_LENGTH]
