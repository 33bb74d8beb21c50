"""Train a reward model from people's ratings and rankings, on the masked encoder or on the tuned decoder.

Run as `python -m tasks.reward`. The model reads a reply and returns one number on the raters' scale. Its loss is
`rating x mean squared error to the mean rating + ordering x Bradley–Terry loss over the pairs of a ranking` (Stiennon
et al. 2020, "Learning to summarize from human feedback", equation 1); a ranking that holds ranks and no scores has
only the second term.

With `words`, the number is the sum of a linear rating of the reply's whole words and of what the model adds to it, as
in Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems". The words are solved for first.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.common import chat, models, stage, tables
from tasks.common.lexicon import Lexicon
from tasks.common.scoring import Scorer, encode, score_rows
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError
from tasks.common.training import Losses, Optimizer, batch_at, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {"model": "{config.model}", "rankings": "data/validate/rankings"}
OUTPUTS = {"model": "data/reward/model", "history": "data/reward/history.csv"}

GAPS = (0.2, 0.5, 1.0, 2.0)
FOLDS = 5  # of the rankings, so that each can be rated by words without being among those learnt from


class Config(Settings):
    """Settings of the reward model."""

    model: Literal["data/pretrain/mlm/model", "data/finetune/model"] = Field(
        description="Model that the head is put on"
    )
    rating: float = Field(description="Weight of the mean squared error to the mean rating", ge=0)
    ordering: float = Field(description="Weight of the Bradley–Terry loss over the pairs of a ranking", ge=0)
    words: bool = Field(description="Add a linear rating of whole words, of which the model learns what is missing")
    max_tokens: int = Field(description="Tokens of a reply that the model reads; words count over all of it", ge=8)
    word_dropout: float = Field(
        description="Share of the tokens that training hides, against learning replies by heart", ge=0, lt=1
    )
    batch: int = Field(description="Rankings a step", ge=1)
    steps: int = Field(description="Optimizer steps", ge=1)
    optimizer: Optimizer

    @model_validator(mode="after")
    def _some_loss(self) -> "Config":
        if not self.rating and not self.ordering:
            raise ValueError("rating and ordering are both 0, so nothing would be learnt; give one of them a weight")
        return self


@dataclass(frozen=True)
class Ranking:
    """One prompt's responses: token ids, mean ratings (None where people only ranked), and who beats whom."""

    texts: list[str]
    ids: list[list[int]]
    ratings: list[float] | None
    pairs: list[tuple[int, int, float]]  # better, worse, gap in rating points (NaN where people only ranked)
    base: list[float]  # what the model's number is added to: the rating by words, or the mean


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the reward model and return its held-out ordering accuracy beside a bag-of-words baseline's."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
    scale = raters_scale(job)
    train_set, heldout = (read_rankings(job, tokenizer, config.max_tokens, split) for split in ("train", "heldout"))
    if not train_set:
        raise StageError(
            "no ranking is left to train on; see data/validate/refused/rankings for why rows were refused."
        )
    unrated = sum(ranking.ratings is None for ranking in train_set)
    if unrated and not config.ordering:
        raise StageError(
            f"{unrated} rankings hold ranks and no scores, which only reward.ordering can learn from; it is 0."
        )
    with models.quiet("transformers"):  # the head is fresh, and is about to be trained
        model = models.load_scorer(job.inputs["model"], job.numerics)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bessemer_max_tokens, model.config.bessemer_scale = config.max_tokens, scale
    lexicon, train_set = with_base(train_set, config.words)

    def loss_at(step: int) -> tuple["torch.Tensor", Losses, int]:
        random = np.random.default_rng([job.seed, step, 1])
        batch = batch_at(train_set, config.batch, job.seed, step)
        batch = [hide_words(ranking, config.word_dropout, tokenizer.mask_token_id, random) for ranking in batch]
        return ranking_loss(model, tokenizer, batch, config, job)

    history = train(model, loss_at, config.optimizer, config.steps, job)
    scorer = Scorer(model, tokenizer, lexicon, scale, config.max_tokens, job.numerics)
    scorer.save(job.outputs["model"])
    history.write(job.outputs["history"])
    return {"rankings": len(train_set), **summary(history), **judge(scorer, train_set, heldout)}


def raters_scale(job: Job) -> list[float] | None:
    """Return the ends of the one scale that all scores are on, None without scores; raise StageError for several."""
    rows = tables.read(job.inputs["rankings"]).to_pylist()
    scales = Counter(tuple(row["scale"]) for row in rows if row["scores"] is not None)
    if len(scales) > 1:
        found = "; ".join(f"{low:g} to {high:g} in {count}" for (low, high), count in scales.most_common())
        raise StageError(
            f"the rankings' scores are on different scales ({found} rankings), and cannot be compared: bring them onto "
            "one scale in their sources, or give ranks instead."
        )
    return list(next(iter(scales))) if scales else None


def read_rankings(job: Job, tokenizer: "PreTrainedTokenizerFast", longest: int, split: str) -> list[Ranking]:
    """Return a split's rankings, encoded, with the pairs that people ordered (ties give none)."""
    result = []
    for row in tables.read(job.inputs["rankings"], split).to_pylist():
        ratings = None if row["scores"] is None else [sum(scores) / len(scores) for scores in row["scores"]]
        places = [-value for value in ratings] if ratings else row["ranks"]
        pairs = [
            (i, j, ratings[i] - ratings[j] if ratings else math.nan)
            for i in range(len(places)) for j in range(len(places)) if places[i] < places[j]
        ]  # fmt: skip
        ids = [encode(tokenizer, text, longest) for text in row["responses"]]
        result.append(Ranking(row["responses"], ids, ratings, pairs, [0.0] * len(ids)))
    return result


def fit_lexicon(rankings: Sequence[Ranking], *, words: bool = True, bigrams: bool = False) -> Lexicon:
    """Return the lexicon of the rankings that hold ratings."""
    rated = [item for ranking in rankings for item in zip(ranking.texts, ranking.ratings or (), strict=False)]
    return Lexicon.fit([text for text, _ in rated], [value for _, value in rated], words=words, bigrams=bigrams)


def with_base(rankings: Sequence[Ranking], words: bool) -> tuple[Lexicon, list[Ranking]]:
    """Return the lexicon of all rankings, and the rankings with the base that the model is trained on.

    A ranking's base comes from a lexicon that has not seen it (out of fold, Wolpert 1992, "Stacked generalization"):
    of what it has seen a lexicon knows too much, and the model would learn to correct too little. Of fewer rated
    rankings than there are folds nothing is known by words: the base is their mean.
    """
    enough = sum(ranking.ratings is not None for ranking in rankings) >= FOLDS
    lexicon = fit_lexicon(rankings, words=words and enough)
    if not lexicon.words:
        return lexicon, [replace(ranking, base=[lexicon.mean] * len(ranking.texts)) for ranking in rankings]
    folds = []
    for fold in range(FOLDS):
        others = [ranking for number, ranking in enumerate(rankings) if number % FOLDS != fold]
        known = any(ranking.ratings for ranking in others)
        folds.append(fit_lexicon(others) if known else Lexicon(lexicon.mean, {}))
    return lexicon, [
        replace(ranking, base=folds[number % FOLDS].score(ranking.texts)) for number, ranking in enumerate(rankings)
    ]


def hide_words(ranking: Ranking, share: float, mask: int, random: np.random.Generator) -> Ranking:
    """Return a ranking in which a share of the responses' tokens, chosen at random, is replaced by the mask token."""
    if not share:
        return ranking
    hidden = [[ids[0], *(mask if random.random() < share else token for token in ids[1:])] for ids in ranking.ids]
    return replace(ranking, ids=hidden)


def ranking_loss(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    batch: Sequence[Ranking],
    config: Config,
    job: Job,
) -> tuple["torch.Tensor", Losses, int]:
    """Return the weighted loss over a batch of rankings, its parts, and the number of tokens read."""
    rows = [ids for ranking in batch for ids in ranking.ids]
    scores = score_rows(model, tokenizer, rows, job.numerics)  # (N,)
    scores = scores + scores.new_tensor([value for ranking in batch for value in ranking.base])
    starts = np.cumsum([0, *(len(ranking.ids) for ranking in batch)])
    rated = [
        (at + i, r) for at, ranking in zip(starts, batch, strict=False) for i, r in enumerate(ranking.ratings or ())
    ]
    ordered = [(at + i, at + j) for at, ranking in zip(starts, batch, strict=False) for i, j, _ in ranking.pairs]
    rating = rating_loss(scores, rated)
    ordering = ordering_loss(scores, ordered)
    loss = config.rating * rating + config.ordering * ordering
    return loss, {"rating_loss": rating, "ordering_loss": ordering}, sum(map(len, rows))


def rating_loss(scores: "torch.Tensor", rated: Sequence[tuple[int, float]]) -> "torch.Tensor":
    """Return the mean squared error between scores and mean ratings, in squared rating points; 0 for none."""
    if not rated:
        return scores.sum() * 0
    places, values = zip(*rated, strict=True)
    return (scores[list(places)] - scores.new_tensor(values)).square().mean()


def ordering_loss(scores: "torch.Tensor", pairs: Sequence[tuple[int, int]]) -> "torch.Tensor":
    """Return the Bradley–Terry loss, the mean of −log sigmoid(better − worse) in nats; 0 where there is no pair."""
    import torch

    if not pairs:
        return scores.sum() * 0
    better, worse = (list(side) for side in zip(*pairs, strict=True))
    return -torch.nn.functional.logsigmoid(scores[better] - scores[worse]).mean()


def judge(scorer: Scorer, train_set: Sequence[Ranking], heldout: Sequence[Ranking]) -> dict[str, Any]:
    """Return held-out ordering accuracy by rating gap, with that of lexicons alone, and the calibration."""
    texts = [text for ranking in heldout for text in ranking.texts]
    if not texts:
        return {"heldout_pairs": 0}
    ours = np.array(scorer.score(texts))
    rated = any(ranking.ratings for ranking in train_set)
    words, bigrams = (
        np.array(fit_lexicon(train_set, bigrams=pairs).score(texts)) if rated else None for pairs in (False, True)
    )
    starts = np.cumsum([0, *(len(ranking.texts) for ranking in heldout)])
    pairs = [(at + i, at + j, gap) for at, ranking in zip(starts, heldout, strict=False) for i, j, gap in ranking.pairs]
    result: dict[str, Any] = {"heldout_pairs": len(pairs)}
    for gap in GAPS:
        chosen = [(i, j) for i, j, size in pairs if size >= gap]
        result[f"gap_at_least_{gap:g}"] = {
            "pairs": len(chosen),
            "model": _accuracy(ours, chosen),
            "bag_of_words": _accuracy(words, chosen),
            "bag_of_words_and_bigrams": _accuracy(bigrams, chosen),
        }
    unmeasured = [(i, j) for i, j, size in pairs if math.isnan(size)]
    if unmeasured:
        result["ranked_only"] = {"pairs": len(unmeasured), "model": _accuracy(ours, unmeasured)}
    predicted = [
        (ours[at + i], value) for at, r in zip(starts, heldout, strict=False) for i, value in enumerate(r.ratings or ())
    ]
    return result | {"calibration": calibration(predicted)}


def _accuracy(scores: "np.ndarray[Any, Any] | None", pairs: Sequence[tuple[int, int]]) -> float | None:
    if scores is None or not pairs:
        return None
    return round(float(np.mean([scores[i] > scores[j] for i, j in pairs])), 4)


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


if __name__ == "__main__":
    stage.main("tasks.reward")
