"""Statistics of the judgements in rankings: contradictions of one annotator, agreement of several, and length bias.

Rankings are added row by row. Their texts are not kept, only some dozen bytes for each pair or response. Agreement
needs to distinguish annotators, so it is measured over rows that name their annotator, and within rows that contain
scores of several raters.
"""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from tasks.common.reward.ratings import mean_score
from tasks.validate import agreement
from tasks.validate.checks import Row, digest

CONTRADICTION_REASON = "the same annotator preferred the opposite in another row"
DECIMALS = 4  # of all figures but counts


class Contradictions:
    """Finds named annotators who prefer A over B in one row and B over A in another.

    Different preferences of different people are disagreement, not an error; `JudgementStatistics` measures it.
    """

    def __init__(self) -> None:
        self._keys, self._signs, self._positions = array("Q"), array("b"), array("q")

    def add(self, position: int, row: Row) -> None:
        """Add a valid ranking with its position in the table."""
        for pair, sign in _iter_preferences(row) if row["annotator"] else ():
            self._keys.append(_hash64(row["annotator"], str(pair)))
            self._signs.append(sign)
            self._positions.append(position)

    def find_positions(self) -> list[int]:
        """Return the positions of all rankings that contradict another; which of them is right is not known."""
        keys, signs = np.asarray(self._keys), np.asarray(self._signs)
        if not keys.size:
            return []
        _, inverse = np.unique(keys, return_inverse=True)
        better, worse = (np.bincount(inverse, weights=signs == sign)[inverse] for sign in (1, -1))
        both = (better > 0) & (worse > 0) & (signs != 0)
        return [int(position) for position in np.unique(np.asarray(self._positions)[both])]


def _iter_preferences(row: Row) -> Iterator[tuple[int, int]]:
    """Yield (hash, sign) for each pair of responses in the order of their texts: 1 if the first is better, 0, or -1."""
    prompt, normalized = _prompt_text(row), [" ".join(response.split()) for response in row["responses"]]
    rated = sorted(zip(normalized, _mean_utilities(row), strict=True))
    for (first, first_utility), (second, second_utility) in combinations(rated, 2):
        sign = (first_utility > second_utility) - (first_utility < second_utility)
        yield _hash64(prompt, first, second), sign


def _prompt_text(row: Row) -> str:
    return "\n".join(message["content"] for message in row["prompt"])


def _mean_utilities(row: Row) -> list[float]:
    """Return a number for each response, greater for a better one: the negative rank, or the mean score."""
    if row["ranks"] is not None:
        return [-rank for rank in row["ranks"]]
    return [mean_score(ratings) for ratings in row["scores"]]


def _hash64(*parts: str) -> int:
    return int.from_bytes(digest("\x00".join(parts))[:8], "big")


class RunningCorrelation:
    """Pearson's correlation of pairs of numbers, updated pair by pair (Welford's algorithm)."""

    def __init__(self) -> None:
        self._count, self._means, self._squares, self._product = 0, [0.0, 0.0], [0.0, 0.0], 0.0

    def add(self, x: float, y: float) -> None:
        """Add one pair."""
        self._count += 1
        before = [value - mean for value, mean in zip((x, y), self._means, strict=True)]
        self._means = [mean + gap / self._count for mean, gap in zip(self._means, before, strict=True)]
        after = [value - mean for value, mean in zip((x, y), self._means, strict=True)]
        self._squares = [total + a * b for total, a, b in zip(self._squares, before, after, strict=True)]
        self._product += before[0] * after[1]

    def correlation(self) -> float | None:
        """Return r, or None if one of the numbers is constant."""
        spread = math.sqrt(self._squares[0] * self._squares[1])
        return self._product / spread if spread else None


@dataclass
class RankingGroup:
    """Statistics of the rankings of one source with one kind of judgement (ranks, or scores on one scale)."""

    scale: Sequence[float] | None  # of scores; None for ranks
    sizes: Counter[int] = field(default_factory=Counter)  # rankings by number of responses
    undecided: int = 0  # rankings without any preference
    annotators: set[str] = field(default_factory=set)
    unnamed: int = 0  # rankings without an annotator
    # Pairs with a preference: 1 where the better response is longer, -1 where it is shorter, 0 for equal lengths.
    longer_preferred: Counter[int] = field(default_factory=Counter)
    rating_length: RunningCorrelation = field(default_factory=RunningCorrelation)
    # Judgements of named annotators: hash of the unit (a pair for ranks, a response for scores), hash of unit and
    # annotator, and value.
    _units: "array[int]" = field(default_factory=lambda: array("Q"))
    _unit_annotators: "array[int]" = field(default_factory=lambda: array("Q"))
    _values: "array[float]" = field(default_factory=lambda: array("d"))
    # Responses with scores of several unnamed raters: number of scores, their sum, and the sum of their squares.
    _rater_sums: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, row: Row) -> None:
        """Add a valid ranking."""
        utilities, lengths = _mean_utilities(row), [len(response) for response in row["responses"]]
        self.sizes[len(utilities)] += 1
        self.undecided += len(set(utilities)) == 1
        rated = zip(utilities, lengths, strict=True)
        for (utility, length), (other_utility, other_length) in combinations(rated, 2):
            if utility != other_utility:
                longer = (length > other_length) - (length < other_length)
                self.longer_preferred[longer if utility > other_utility else -longer] += 1
        if row["annotator"]:
            self.annotators.add(row["annotator"])
        else:
            self.unnamed += 1
        if self.scale is not None:
            for utility, length in zip(utilities, lengths, strict=True):
                self.rating_length.add(utility, length)
        self._add_agreement(row)

    def _add_agreement(self, row: Row) -> None:
        """Add the judgements of a ranking to those that agreement is computed from."""
        prompt, middle = _prompt_text(row), sum(self.scale) / 2 if self.scale is not None else 0
        if row["annotator"]:
            rated = zip(row["responses"], _mean_utilities(row), strict=True) if self.scale is not None else ()
            scores = [(_hash64(prompt, " ".join(text.split())), value - middle) for text, value in rated]
            for unit, value in scores if self.scale is not None else _iter_preferences(row):
                self._units.append(unit)
                self._unit_annotators.append(_hash64(row["annotator"], str(unit)))
                self._values.append(value)
        else:
            for ratings in row["scores"] or ():
                centered = [value - middle for value in ratings]
                self._rater_sums.extend((len(centered), math.fsum(centered), math.fsum(value**2 for value in centered)))

    def agreement(self) -> dict[str, Any]:
        """Return Krippendorff's alpha, the number of units with two or more judgements, and the number of these."""
        judges, first, inverse = np.unique(np.asarray(self._unit_annotators), return_index=True, return_inverse=True)
        # An annotator who judged a unit twice counts once, with the mean of the scores or the sign of the preferences.
        _, counts, sums = agreement.sum_by_key(inverse, np.ones(len(inverse)), np.asarray(self._values))
        means = sums / counts if self.scale is not None else np.sign(sums)
        units = np.asarray(self._units)[first]
        _, *named_sums = agreement.sum_by_key(units, np.ones(len(judges)), means, means**2)
        unnamed_sums = np.asarray(self._rater_sums).reshape(-1, 3).T
        unit_sums = [np.concatenate(parts) for parts in zip(named_sums, unnamed_sums, strict=True)]
        alpha = agreement.interval_alpha(*unit_sums) if self.scale is not None else _pairwise_alpha(*unit_sums)
        pairable = unit_sums[0][unit_sums[0] > 1]
        return {"alpha": _round(alpha), "units": len(pairable), "judgements": int(pairable.sum())}

    def figures(self) -> dict[str, Any]:
        """Return the figures; None stands for one that is not defined."""
        unequal = self.longer_preferred[1] + self.longer_preferred[-1]
        return {
            "rankings": self.sizes.total(),
            "responses": {str(size): count for size, count in sorted(self.sizes.items())},
            "undecided": self.undecided,
            "annotators": len(self.annotators),
            "unnamed": self.unnamed,
            **self.agreement(),
            "pairs": self.longer_preferred.total(),
            "longer_preferred": _round(self.longer_preferred[1] / unequal if unequal else None),
            "rating_length_correlation": _round(self.rating_length.correlation()),
        }


def _pairwise_alpha(counts: Any, sums: Any, squares: Any) -> float | None:
    """Return alpha of preferences -1, 0, 1. Each pair counts in both orders, because the order carries no meaning."""
    better, worse = (squares + sums) / 2, (squares - sums) / 2
    table = np.column_stack([worse, counts - squares, better])
    return agreement.ordinal_alpha(np.concatenate([table, table[:, ::-1]]))


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, DECIMALS)


class JudgementStatistics:
    """Statistics of the rankings of a table, by source and kind of judgement."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], RankingGroup] = {}

    def add(self, row: Row) -> None:
        """Add a valid ranking."""
        scale = None if row["ranks"] is not None else row["scale"]
        key = row["source"], "ranks" if scale is None else "scores {:g} to {:g}".format(*scale)
        self._groups.setdefault(key, RankingGroup(scale)).add(row)

    def figures(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the figures by source and kind of judgement (`ranks`, `scores 1 to 5`)."""
        found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for (source, kind), group in sorted(self._groups.items()):
            found[source][kind] = group.figures()
        return dict(found)
