"""What the rankings say of their raters: whom they contradict, how far they agree, whether they like what is long.

Rankings come row by row and their texts are not kept: of each pair or response some dozen bytes are, as numbers that
stand for it. Agreement needs to know people apart, so it is measured where a row names its annotator, and within a row
that holds scores of several raters.
"""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from tasks.common.ratings import mean_score
from tasks.common.validation import agreement
from tasks.common.validation.checks import Row, digest

CONTRADICTION = "the same annotator preferred the opposite in another row"
PLACES = 4  # of the figures that are no counts


class Contradictions:
    """The preferences of those who are named, to find who prefers A over B in one row and B over A in another.

    What differs between people is disagreement, no error, and is measured instead.
    """

    def __init__(self) -> None:
        self._keys, self._signs, self._positions = array("Q"), array("b"), array("q")

    def add(self, position: int, row: Row) -> None:
        """Take a sound ranking at a position of its table."""
        for key, sign in _preferences(row) if row["annotator"] else ():
            self._keys.append(_number(row["annotator"], str(key)))
            self._signs.append(sign)
            self._positions.append(position)

    def settle(self) -> list[int]:
        """Return the positions of rankings that contradict another: of both sides, for who knows which is meant."""
        keys, signs = np.asarray(self._keys), np.asarray(self._signs)
        if not keys.size:
            return []
        _, inverse = np.unique(keys, return_inverse=True)
        better, worse = (np.bincount(inverse, weights=signs == sign)[inverse] for sign in (1, -1))
        both = (better > 0) & (worse > 0) & (signs != 0)
        return [int(position) for position in np.unique(np.asarray(self._positions)[both])]


def _preferences(row: Row) -> Iterator[tuple[int, int]]:
    """Yield each pair of responses as a number and 1, 0 or -1: the response whose text comes first is better or not."""
    asked, plain = _asked(row), [" ".join(response.split()) for response in row["responses"]]
    for (one, worth), (other, against) in combinations(sorted(zip(plain, _worth(row), strict=True)), 2):
        yield _number(asked, one, other), (worth > against) - (worth < against)


def _asked(row: Row) -> str:
    return "\n".join(message["content"] for message in row["prompt"])


def _worth(row: Row) -> list[float]:
    """Return a number a response that is greater the better it was judged."""
    if row["ranks"] is not None:
        return [-rank for rank in row["ranks"]]
    return [mean_score(given) for given in row["scores"]]


def _number(*parts: str) -> int:
    return int.from_bytes(digest("\x00".join(parts))[:8], "big")


class Moments:
    """Pearson's correlation of two numbers that come pair by pair (Welford's way, which needs no second look)."""

    def __init__(self) -> None:
        self._count, self._means, self._squares, self._product = 0, [0.0, 0.0], [0.0, 0.0], 0.0

    def add(self, one: float, other: float) -> None:
        """Take one pair."""
        self._count += 1
        before = [value - mean for value, mean in zip((one, other), self._means, strict=True)]
        self._means = [mean + gap / self._count for mean, gap in zip(self._means, before, strict=True)]
        after = [value - mean for value, mean in zip((one, other), self._means, strict=True)]
        self._squares = [held + a * b for held, a, b in zip(self._squares, before, after, strict=True)]
        self._product += before[0] * after[1]

    def correlation(self) -> float | None:
        """Return r, or None where one of the numbers never changes."""
        spread = math.sqrt(self._squares[0] * self._squares[1])
        return self._product / spread if spread else None


@dataclass
class Group:
    """Rankings of one source that were judged in one way, row by row reduced to numbers."""

    scale: Sequence[float] | None
    sizes: Counter[int] = field(default_factory=Counter)  # rankings by number of responses
    undecided: int = 0  # rankings without any preference
    people: set[str] = field(default_factory=set)
    unnamed: int = 0  # rankings
    lengths: Counter[int] = field(default_factory=Counter)  # pairs: the better is longer (1), shorter (-1), as long (0)
    moments: Moments = field(default_factory=Moments)
    # Of those who are named: what was judged (a pair under ranks, a response under scores), that with who did, and how.
    _units: "array[int]" = field(default_factory=lambda: array("Q"))
    _judges: "array[int]" = field(default_factory=lambda: array("Q"))
    _values: "array[float]" = field(default_factory=lambda: array("d"))
    # Of responses with scores of several people: how many, their sum, the sum of their squares.
    _rated: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, row: Row) -> None:
        """Take one sound ranking."""
        worth, lengths = _worth(row), [len(response) for response in row["responses"]]
        self.sizes[len(worth)] += 1
        self.undecided += len(set(worth)) == 1
        for (one, size), (other, against) in combinations(zip(worth, lengths, strict=True), 2):
            if one != other:
                longer = (size > against) - (size < against)
                self.lengths[longer if one > other else -longer] += 1
        if row["annotator"]:
            self.people.add(row["annotator"])
        else:
            self.unnamed += 1
        if self.scale is not None:
            for value, size in zip(worth, lengths, strict=True):
                self.moments.add(value, size)
        self._judge(row)

    def _judge(self, row: Row) -> None:
        """Take what agreement is measured by."""
        asked, middle = _asked(row), sum(self.scale) / 2 if self.scale is not None else 0
        if row["annotator"]:
            rated = zip(row["responses"], _worth(row), strict=True) if self.scale is not None else ()
            of_units = [(_number(asked, " ".join(text.split())), value - middle) for text, value in rated]
            for unit, value in of_units if self.scale is not None else _preferences(row):
                self._units.append(unit)
                self._judges.append(_number(row["annotator"], str(unit)))
                self._values.append(value)
        else:
            for given in row["scores"] or ():
                told = [value - middle for value in given]
                self._rated.extend((len(told), math.fsum(told), math.fsum(value**2 for value in told)))

    def agreement(self) -> dict[str, Any]:
        """Return Krippendorff's alpha with the units that two or more people judged, and their judgements."""
        judges, first, inverse = np.unique(np.asarray(self._judges), return_index=True, return_inverse=True)
        # Who judged the same twice is asked once: the mean, of preferences its sign.
        _, counts, sums = agreement.sums_by(inverse, np.ones(len(inverse)), np.asarray(self._values))
        means = sums / counts if self.scale is not None else np.sign(sums)
        units = np.asarray(self._units)[first]
        _, *found = agreement.sums_by(units, np.ones(len(judges)), means, means**2)
        found = [np.concatenate(parts) for parts in zip(found, np.asarray(self._rated).reshape(-1, 3).T, strict=True)]
        alpha = agreement.interval(*found) if self.scale is not None else _mirrored(*found)
        judged = found[0][found[0] > 1]
        return {"alpha": _round(alpha), "units": len(judged), "judgements": int(judged.sum())}

    def figures(self) -> dict[str, Any]:
        """Return the figures, of which those that could not be had are null."""
        unequal = self.lengths[1] + self.lengths[-1]
        return {
            "rankings": self.sizes.total(),
            "responses": {str(size): count for size, count in sorted(self.sizes.items())},
            "undecided": self.undecided,
            "annotators": len(self.people),
            "unnamed": self.unnamed,
            **self.agreement(),
            "pairs": self.lengths.total(),
            "longer_preferred": _round(self.lengths[1] / unequal if unequal else None),
            "rating_length_correlation": _round(self.moments.correlation()),
        }


def _mirrored(counts: Any, sums: Any, squares: Any) -> float | None:
    """Return alpha of preferences -1, 0, 1; each pair stands in both orders, for which is named first says nothing."""
    better, worse = (squares + sums) / 2, (squares - sums) / 2
    table = np.column_stack([worse, counts - squares, better])
    return agreement.ordinal(np.concatenate([table, table[:, ::-1]]))


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, PLACES)


class Judgements:
    """The figures of a table's rankings, by source and by how they were judged."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], Group] = {}

    def add(self, row: Row) -> None:
        """Take one sound ranking."""
        scale = None if row["ranks"] is not None else row["scale"]
        key = row["source"], "ranks" if scale is None else "scores {:g} to {:g}".format(*scale)
        self._groups.setdefault(key, Group(scale)).add(row)

    def figures(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the figures of each source, by how its rankings were judged."""
        told: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for (source, judged), group in sorted(self._groups.items()):
            told[source][judged] = group.figures()
        return dict(told)
