"""Train a reward model from people's ratings and rankings, on the masked encoder or on the tuned decoder.

Run as `python -m tasks.reward`. The model reads a reply and returns one number on the raters' scale. Its loss is
`rating x mean squared error to the mean rating + ordering x Bradley–Terry loss over the pairs of a ranking` (Stiennon
et al. 2020, "Learning to summarize from human feedback", equation 1); a ranking that holds ranks and no scores has
only the second term.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.common import chat, models, stage, tables
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


class Config(Settings):
    """Settings of the reward model."""

    model: Literal["data/pretrain/mlm/model", "data/finetune/model"] = Field(
        description="Model that the head is put on"
    )
    rating: float = Field(description="Weight of the mean squared error to the mean rating", ge=0)
    ordering: float = Field(description="Weight of the Bradley–Terry loss over the pairs of a ranking", ge=0)
    max_tokens: int = Field(description="Longest reply that is read; longer ones are cut", ge=8)
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


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the reward model and return its held-out ordering accuracy beside a bag-of-words baseline's."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
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
    model = models.load_scorer(job.inputs["model"], job.numerics)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bessemer_reward_offset = offset = _mean_rating(train_set)
    model.config.bessemer_max_tokens = config.max_tokens

    def loss_at(step: int) -> tuple["torch.Tensor", Losses, int]:
        random = np.random.default_rng([job.seed, step, 1])
        batch = batch_at(train_set, config.batch, job.seed, step)
        batch = [hide_words(ranking, config.word_dropout, tokenizer.mask_token_id, random) for ranking in batch]
        return ranking_loss(model, tokenizer, batch, config, offset, job)

    history = train(model, loss_at, config.optimizer, config.steps, job)
    models.save(model, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    scorer = Scorer(model, tokenizer, config.max_tokens, job.numerics)
    return {"rankings": len(train_set), **summary(history), **judge(scorer, train_set, heldout)}


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
        result.append(Ranking(row["responses"], ids, ratings, pairs))
    return result


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
    offset: float,
    job: Job,
) -> tuple["torch.Tensor", Losses, int]:
    """Return the weighted loss over a batch of rankings, its parts, and the number of tokens read."""
    rows = [ids for ranking in batch for ids in ranking.ids]
    scores = score_rows(model, tokenizer, rows, job.numerics) + offset  # (N,)
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


def _mean_rating(rankings: Sequence[Ranking]) -> float:
    ratings = [value for ranking in rankings for value in ranking.ratings or ()]
    return round(sum(ratings) / len(ratings), 6) if ratings else 0.0


def judge(scorer: Scorer, train_set: Sequence[Ranking], heldout: Sequence[Ranking]) -> dict[str, Any]:
    """Return held-out ordering accuracy by rating gap of model and bag of words, and the model's calibration."""
    texts = [text for ranking in heldout for text in ranking.texts]
    if not texts:
        return {"heldout_pairs": 0}
    ours = np.array(scorer.score(texts))
    rated_set = [ranking for ranking in train_set if ranking.ratings]
    words, bigrams = bag_of_words(rated_set, texts), bag_of_words(rated_set, texts, bigrams=True)
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
    rated = [
        (ours[at + i], value) for at, r in zip(starts, heldout, strict=False) for i, value in enumerate(r.ratings or ())
    ]
    return result | {"calibration": calibration(rated)}


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


def bag_of_words(
    rankings: Sequence[Ranking], texts: Sequence[str], *, bigrams: bool = False
) -> "np.ndarray[Any, Any] | None":
    """Return a ridge regression's ratings of texts from their words (and word pairs): the baselines to beat."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import lsqr

    pairs = [
        (text, value) for ranking in rankings for text, value in zip(ranking.texts, ranking.ratings or (), strict=True)
    ]
    if not pairs:
        return None
    columns: dict[str, int] = {}
    for text, _ in pairs:
        for term in _terms(text, bigrams):
            columns.setdefault(term, len(columns))

    def counts(items: Sequence[str]) -> Any:
        cells = [
            (row, columns[term])
            for row, text in enumerate(items)
            for term in set(_terms(text, bigrams))
            if term in columns
        ]
        rows, places = zip(*cells, strict=True) if cells else ((), ())
        return csr_matrix((np.ones(len(cells)), (rows, places)), shape=(len(items), len(columns)))

    values = np.array([value for _, value in pairs])
    weights = lsqr(counts([text for text, _ in pairs]), values - values.mean(), damp=3.0, iter_lim=200)[0]
    return np.asarray(counts(texts) @ weights + values.mean())


def _terms(text: str, bigrams: bool) -> list[str]:
    words = re.findall(r"[a-z']+|[^\sa-z']", text.lower())
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))] if bigrams else words


if __name__ == "__main__":
    stage.main("tasks.reward")
