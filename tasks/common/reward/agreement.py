"""Agreement of a reward model with people on held-out rankings: ordering accuracy, length bias and calibration."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.common.reward.lexicon import Lexicon
from tasks.common.reward.rankings import Ranking
from tasks.common.reward.scoring import Scorer
from tasks.common.text.words import split_words

RATING_GAPS = (0.2, 0.5, 1.0, 2.0)
RANKED_ONLY = "ranked_only"  # key of the figures of pairs that people ranked without rating
HEADLINE_KEYS = ("gap_at_least_1", "gap_at_least_0.5", "gap_at_least_0.2", RANKED_ONLY)
Numbers = npt.NDArray[np.float64]
Pair = tuple[int, int]  # indices of the better and of the worse response


def pairwise_agreement(
    scorer: Scorer, heldout: Sequence[Ranking], lexicons: Mapping[str, Lexicon | None], desc: str | None = None
) -> dict[str, Any]:
    """Return ordering accuracy by rating gap (the model's and each lexicon's), length bias and calibration.

    For an ensemble, `disagreement` is the mean standard deviation of its heads. `desc` is the title of the progress
    bar; without it none is shown.
    """
    if not heldout:
        return {"heldout_pairs": 0}
    exchanges = [exchange for ranking in heldout for exchange in ranking.exchanges]
    score_list, stds = scorer.score_with_std(exchanges, desc=desc)
    scores, texts = np.array(score_list), [text for ranking in heldout for text in ranking.texts]
    baselines = {name: np.array(lexicon.score(texts)) if lexicon else None for name, lexicon in lexicons.items()}
    starts = np.cumsum([0, *(len(ranking.texts) for ranking in heldout)]).tolist()
    with_start = list(zip(starts, heldout, strict=False))
    pairs = [(start + i, start + j, gap) for start, ranking in with_start for i, j, gap in ranking.pairs]
    result: dict[str, Any] = {"heldout_pairs": len(pairs)}
    for min_gap in RATING_GAPS:
        chosen = [(i, j) for i, j, gap in pairs if gap >= min_gap]
        of_lexicons = {name: accuracy(values, chosen) for name, values in baselines.items()}
        result[f"gap_at_least_{min_gap:g}"] = {"pairs": len(chosen), "model": accuracy(scores, chosen), **of_lexicons}
    unrated = [(i, j) for i, j, gap in pairs if math.isnan(gap)]
    if unrated:
        of_lexicons = {name: accuracy(values, unrated) for name, values in baselines.items()}
        result[RANKED_ONLY] = {"pairs": len(unrated), "model": accuracy(scores, unrated), **of_lexicons}
    if any(stds):
        result["disagreement"] = round(float(np.mean(stds)), 4)
    rated = [(start + i, value) for start, ranking in with_start for i, value in enumerate(ranking.ratings or ())]
    lengths = np.array([len(split_words(text)) for text in texts], dtype=float)
    return result | {
        "length": length_bias(scores, lengths, rated, [(i, j) for i, j, _ in pairs]),
        "calibration": calibration([(score_list[index], value) for index, value in rated]),
    }


def headline(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures that a reward model is gated on, out of those of `pairwise_agreement`; {} if there are none.

    These are the pairs with a gap of at least one rating point, else of smaller gaps, else pairs that were only ranked.
    """
    found = (figures.get(name) or {} for name in HEADLINE_KEYS)
    return next((figure for figure in found if figure.get("model") is not None), {})


def accuracy(scores: Numbers | None, pairs: Sequence[Pair]) -> float | None:
    """Return the share of pairs in which the better response has the higher score; a tie counts as wrong."""
    if scores is None or not pairs:
        return None
    return round(float(np.mean([scores[i] > scores[j] for i, j in pairs])), 4)


def length_bias(
    scores: Numbers, lengths: Numbers, rated: Sequence[tuple[int, float]], pairs: Sequence[Pair]
) -> dict[str, float | None]:
    """Return how scores and people's judgements depend on length in words (Singhal et al. 2023, "A Long Way to Go").

    These are Pearson's correlation over all responses and over those that people rated, and the share of pairs of
    unequal length in which the longer response is preferred.
    """
    indices = [index for index, _ in rated]
    unequal = [(i, j) for i, j in pairs if lengths[i] != lengths[j]]
    longer = [(i, j) if lengths[i] > lengths[j] else (j, i) for i, j in unequal]
    return {
        "correlation": correlation(scores, lengths),
        "correlation_of_raters": correlation(np.array([value for _, value in rated]), lengths[indices]),
        "longer_first": accuracy(scores, longer),
        "longer_first_by_people": accuracy(lengths, unequal),
    }


def correlation(a: Numbers, b: Numbers) -> float | None:
    """Return Pearson's correlation; None if one side does not vary."""
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
