"""How well a reward model finds people's order again, on rankings that it was not trained on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.common.evaluation.rankings import Ranking
from tasks.common.evaluation.scoring import Scorer
from tasks.common.modelling.lexicon import Lexicon
from tasks.common.validation.words import split_words

GAPS = (0.2, 0.5, 1.0, 2.0)
RANKED = "ranked_only"  # figures of pairs that people put in order without rating them
HEADLINE = ("gap_at_least_1", "gap_at_least_0.5", "gap_at_least_0.2", RANKED)
Numbers = npt.NDArray[np.float64]
Pair = tuple[int, int]  # places of the better and of the worse response


def judge(scorer: Scorer, heldout: Sequence[Ranking], peers: Mapping[str, Lexicon | None]) -> dict[str, Any]:
    """Return ordering accuracy by rating gap, with that of lexicons alone, calibration, and what length has to do.

    An ensemble's figures also say how far its heads lie apart.
    """
    if not heldout:
        return {"heldout_pairs": 0}
    scores, apart = scorer.judge([exchange for ranking in heldout for exchange in ranking.exchanges])
    ours, texts = np.array(scores), [text for ranking in heldout for text in ranking.texts]
    words = {name: np.array(lexicon.score(texts)) if lexicon else None for name, lexicon in peers.items()}
    starts = np.cumsum([0, *(len(ranking.texts) for ranking in heldout)]).tolist()
    placed = list(zip(starts, heldout, strict=False))
    pairs = [(at + i, at + j, gap) for at, ranking in placed for i, j, gap in ranking.pairs]
    result: dict[str, Any] = {"heldout_pairs": len(pairs)}
    for gap in GAPS:
        chosen = [(i, j) for i, j, size in pairs if size >= gap]
        theirs = {name: accuracy(values, chosen) for name, values in words.items()}
        result[f"gap_at_least_{gap:g}"] = {"pairs": len(chosen), "model": accuracy(ours, chosen), **theirs}
    unmeasured = [(i, j) for i, j, size in pairs if math.isnan(size)]
    if unmeasured:
        theirs = {name: accuracy(values, unmeasured) for name, values in words.items()}
        result[RANKED] = {"pairs": len(unmeasured), "model": accuracy(ours, unmeasured), **theirs}
    if any(apart):
        result["disagreement"] = round(float(np.mean(apart)), 4)
    rated = [(at + i, value) for at, ranking in placed for i, value in enumerate(ranking.ratings or ())]
    lengths = np.array([len(split_words(text)) for text in texts], dtype=float)
    return result | {
        "length": length(ours, lengths, rated, [(i, j) for i, j, _ in pairs]),
        "calibration": calibration([(scores[place], value) for place, value in rated]),
    }


def headline(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of the pairs that a reward model is held to, of what `judge` found; {} where there are none.

    They are those a rating point apart; on a scale that is shorter, or of people who ranked alone, what else there is.
    """
    found = (figures.get(name) or {} for name in HEADLINE)
    return next((figure for figure in found if figure.get("model") is not None), {})


def accuracy(scores: Numbers | None, pairs: Sequence[Pair]) -> float | None:
    """Return the share of pairs in which the better response has the higher score; a tie is no order."""
    if scores is None or not pairs:
        return None
    return round(float(np.mean([scores[i] > scores[j] for i, j in pairs])), 4)


def length(
    scores: Numbers, lengths: Numbers, rated: Sequence[tuple[int, float]], pairs: Sequence[Pair]
) -> dict[str, float | None]:
    """Return what a response's number of words has to do with scores, and with what people said.

    Pearson's correlation over all responses and over those that people rated, and the share of pairs of unequal length
    in which the longer one is put first (Singhal et al. 2023, "A Long Way to Go").
    """
    places = [place for place, _ in rated]
    unequal = [(i, j) for i, j in pairs if lengths[i] != lengths[j]]
    longer = [(i, j) if lengths[i] > lengths[j] else (j, i) for i, j in unequal]
    return {
        "correlation": correlation(scores, lengths),
        "correlation_of_raters": correlation(np.array([value for _, value in rated]), lengths[places]),
        "longer_first": accuracy(scores, longer),
        "longer_first_by_people": accuracy(lengths, unequal),
    }


def correlation(a: Numbers, b: Numbers) -> float | None:
    """Return Pearson's correlation; None where one side does not vary."""
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return None
    return round(float(np.corrcoef(a, b)[0, 1]), 4)


def calibration(rated: Sequence[tuple[float, float]], bins: int = 10) -> list[dict[str, float]]:
    """Return, for equal-sized bins of predicted rating, the mean predicted and the mean human rating."""
    ordered = sorted(rated)
    chunks = [ordered[len(ordered) * k // bins : len(ordered) * (k + 1) // bins] for k in range(bins)]
    return [
        {
            "predicted": round(sum(p for p, _ in chunk) / len(chunk), 4),
            "rated": round(sum(r for _, r in chunk) / len(chunk), 4),
        }
        for chunk in chunks
        if chunk
    ]
