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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.common import stage, tables
from tasks.common.evaluation.scoring import Scorer, encode, score_rows
from tasks.common.modelling import models
from tasks.common.modelling.lexicon import Lexicon
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.training import losses
from tasks.common.training.loop import NAMED, Drawn, Share, Training, batch_at, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {"model": "{config.model}", "rankings": "data/validate/rankings"}
OUTPUTS = {"model": "data/reward/model", "history": "data/reward/history.csv"}
PARALLEL = True

GAPS = (0.2, 0.5, 1.0, 2.0)
FOLDS = 5  # of the rankings, so that each can be rated by words without being among those learnt from


class Pairwise(Settings):
    """Bradley–Terry: every pair of a ranking that people ordered."""

    name: Literal["bradley_terry"] = Field(description="Loss over a ranking's order")
    weight: float = Field(description="Weight of the loss", ge=0)
    margin: float = Field(description="Distance asked between two scores, for each rating point between them", ge=0)


class Listwise(Settings):
    """Plackett–Luce: a ranking as one choice after another of the best that is left."""

    name: Literal["plackett_luce"] = Field(description="Loss over a ranking's order")
    weight: float = Field(description="Weight of the loss", ge=0)


class Config(Training):
    """Settings of the reward model."""

    model: Literal["data/pretrain/mlm/model", "data/finetune/model"] = Field(
        description="Model that the head is put on"
    )
    rating: float = Field(description="Weight of the mean squared error to the mean rating", ge=0)
    ordering: Annotated[Pairwise | Listwise, Field(discriminator="name")]
    words: bool = Field(description="Add a linear rating of whole words, of which the model learns what is missing")
    max_tokens: int = Field(description="Tokens of a reply that the model reads; words count over all of it", ge=8)
    word_dropout: float = Field(
        description="Share of the tokens that training hides, against learning replies by heart", ge=0, lt=1
    )
    batch: int = Field(description="Rankings a step", ge=1)

    @model_validator(mode="after")
    def _some_loss(self) -> "Config":
        if not self.rating and not self.ordering.weight:
            raise ValueError(
                "rating and ordering.weight are both 0, so nothing would be learnt; give one of them a weight"
            )
        return self


@dataclass(frozen=True)
class Ranking:
    """One prompt's responses: token ids, mean ratings (None where people only ranked), and who beats whom."""

    id: str
    texts: list[str]
    ids: list[list[int]]
    ratings: list[float] | None
    pairs: list[tuple[int, int, float]]  # better, worse, gap in rating points (NaN where people only ranked)
    order: list[list[int]]  # the responses, best first; those in one group are tied
    cut: int  # how many responses are longer than what the model reads of them


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the reward model and return its held-out ordering accuracy beside a bag-of-words baseline's."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
    if config.word_dropout and tokenizer.mask_token_id is None:
        raise StageError(
            f"reward.word_dropout is {config.word_dropout}, but the model's tokenizer has no mask token to hide tokens "
            "behind; set it to 0."
        )
    rows = tables.read(job.inputs["rankings"]).to_pylist()
    scale = raters_scale(rows)
    train_set, heldout = (
        [read_ranking(row, tokenizer, config.max_tokens) for row in rows if row["split"] == split]
        for split in ("train", "heldout")
    )
    if not train_set:
        raise StageError(
            "no ranking is left to train on; see data/validate/refused/rankings for why rows were refused."
        )
    unrated = sum(ranking.ratings is None for ranking in train_set)
    if unrated and not config.ordering.weight:
        raise StageError(
            f"{unrated} rankings hold ranks and no scores, which only reward.ordering can learn from; its weight is 0."
        )
    with models.quiet("transformers"):  # the head is fresh, and is about to be trained
        model = models.load_scorer(job.inputs["model"], job.numerics)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bessemer_max_tokens, model.config.bessemer_scale = config.max_tokens, scale
    lexicon, bases = with_bases(train_set, config.words)
    model, history = train(model, Judgements(config, job, model, tokenizer, train_set, bases), config, job)
    scorer = Scorer(model, tokenizer, lexicon, scale, config.max_tokens, job.numerics)
    scorer.save(job.outputs["model"])
    history.write(job.outputs["history"])
    cut = [ranking for ranking in (*train_set, *heldout) if ranking.cut]
    return {
        "rankings": len(train_set),
        "cut_responses": sum(ranking.cut for ranking in cut),
        "cut_in": [ranking.id for ranking in cut[:NAMED]],
        **summary(history),
        **judge(scorer, train_set, heldout),
    }


class Judgements:
    """What people said of replies, as the objective of the model."""

    steady = False

    def __init__(
        self, config: Config, job: Job, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast",
        rankings: Sequence[Ranking], bases: Sequence[list[float]],
    ) -> None:  # fmt: skip
        terms = {"rating": config.rating, "ordering": config.ordering.weight}
        self.weights = {name: weight for name, weight in terms.items() if weight}
        self.config, self.job, self.model, self.tokenizer = config, job, model, tokenizer
        self.items = list(zip(rankings, bases, strict=True))

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's rankings with their bases, some of their tokens hidden."""
        random = np.random.default_rng([self.job.seed, step, 1])
        hide, mask = self.config.word_dropout, self.tokenizer.mask_token_id
        batch = batch_at(self.items, self.config.batch, self.job.seed, step)
        part = [(hide_words(ranking, hide, mask, random), base) for ranking, base in batch][share.rows]
        targets = {
            "rating": sum(len(ranking.ratings or ()) for ranking, _ in part),
            "ordering": sum(self._choices(ranking) for ranking, _ in part),
        }
        tokens = sum(len(ids) for ranking, _ in part for ids in ranking.ids)
        return Drawn(part, targets, tokens, [f"ranking {ranking.id}" for ranking, _ in part])

    def _choices(self, ranking: Ranking) -> int:
        listwise = isinstance(self.config.ordering, Listwise)
        return sum(map(len, ranking.order[:-1])) if listwise else len(ranking.pairs)

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed squared error to the mean ratings, and the summed loss over the orders."""
        batch: Sequence[tuple[Ranking, list[float]]] = drawn.content
        rows = [ids for ranking, _ in batch for ids in ranking.ids]
        together = len(rows) if self.job.numerics.parallel.in_step else chat.TOGETHER
        scores = score_rows(self.model, self.tokenizer, rows, self.job.numerics, together)  # (N,)
        scores = scores + scores.new_tensor([value for _, base in batch for value in base])
        starts = np.cumsum([0, *(len(ranking.ids) for ranking, _ in batch)]).tolist()
        placed = [(at, ranking) for at, (ranking, _) in zip(starts, batch, strict=False)]
        rated = [(at + i, value) for at, ranking in placed for i, value in enumerate(ranking.ratings or ())]
        places, values = [place for place, _ in rated], [value for _, value in rated]
        return {
            "rating": losses.squared_error(scores[places], scores.new_tensor(values)),
            "ordering": self._ordering(scores, placed),
        }

    def _ordering(self, scores: "torch.Tensor", placed: Sequence[tuple[int, Ranking]]) -> "torch.Tensor":
        ordering = self.config.ordering
        if isinstance(ordering, Listwise):
            orders = [[[at + i for i in group] for group in ranking.order] for at, ranking in placed]
            return losses.plackett_luce(scores, orders)
        pairs = [(at + i, at + j, gap) for at, ranking in placed for i, j, gap in ranking.pairs]
        return losses.bradley_terry(scores, pairs, ordering.margin)


def raters_scale(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the ends of the one scale that all scores are on, None without scores; raise StageError for several."""
    scales = Counter(tuple(row["scale"]) for row in rows if row["scores"] is not None)
    if len(scales) > 1:
        found = "; ".join(f"{low:g} to {high:g} in {count}" for (low, high), count in scales.most_common())
        raise StageError(
            f"the rankings' scores are on different scales ({found} rankings), and cannot be compared: bring them onto "
            "one scale in their sources, or give ranks instead."
        )
    return list(next(iter(scales))) if scales else None


def read_ranking(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast", longest: int) -> Ranking:
    """Return a ranking's replies, encoded, with the pairs and the order that people gave (ties make no pair)."""
    ratings = None if row["scores"] is None else [sum(scores) / len(scores) for scores in row["scores"]]
    places = [-value for value in ratings] if ratings else row["ranks"]
    pairs = [
        (i, j, ratings[i] - ratings[j] if ratings else math.nan)
        for i in range(len(places)) for j in range(len(places)) if places[i] < places[j]
    ]  # fmt: skip
    order = [[i for i, other in enumerate(places) if other == place] for place in sorted(set(places))]
    ids = [encode(tokenizer, text, longest + 1) for text in row["responses"]]
    cut = sum(len(found) > longest for found in ids)
    return Ranking(row["id"], row["responses"], [found[:longest] for found in ids], ratings, pairs, order, cut)


def fit_lexicon(rankings: Sequence[Ranking], *, words: bool = True, bigrams: bool = False) -> Lexicon:
    """Return the lexicon of the rankings that hold ratings."""
    rated = [item for ranking in rankings for item in zip(ranking.texts, ranking.ratings or (), strict=False)]
    return Lexicon.fit([text for text, _ in rated], [value for _, value in rated], words=words, bigrams=bigrams)


def with_bases(rankings: Sequence[Ranking], words: bool) -> tuple[Lexicon, list[list[float]]]:
    """Return the lexicon of all rankings, and for each ranking the base that the model is trained on.

    A ranking's base comes from a lexicon that has not seen it (out of fold, Wolpert 1992, "Stacked generalization"):
    of what it has seen a lexicon knows too much, and the model would learn to correct too little. Of fewer rated
    rankings than there are folds nothing is known by words: the base is their mean.
    """
    enough = sum(ranking.ratings is not None for ranking in rankings) >= FOLDS
    lexicon = fit_lexicon(rankings, words=words and enough)
    if not lexicon.words:
        return lexicon, [[lexicon.mean] * len(ranking.texts) for ranking in rankings]
    folds = []
    for fold in range(FOLDS):
        others = [ranking for number, ranking in enumerate(rankings) if number % FOLDS != fold]
        known = any(ranking.ratings for ranking in others)
        folds.append(fit_lexicon(others) if known else Lexicon(lexicon.mean, {}))
    return lexicon, [folds[number % FOLDS].score(ranking.texts) for number, ranking in enumerate(rankings)]


def hide_words(ranking: Ranking, share: float, mask: int, random: np.random.Generator) -> Ranking:
    """Return a ranking in which a share of the responses' tokens, chosen at random, is replaced by the mask token."""
    if not share:
        return ranking
    hidden = [[ids[0], *(mask if random.random() < share else token for token in ids[1:])] for ids in ranking.ids]
    return replace(ranking, ids=hidden)


def judge(scorer: Scorer, train_set: Sequence[Ranking], heldout: Sequence[Ranking]) -> dict[str, Any]:
    """Return held-out ordering accuracy by rating gap, with that of lexicons alone, and the calibration."""
    texts = [text for ranking in heldout for text in ranking.texts]
    if not texts:
        return {"heldout_pairs": 0}
    ours = np.array(scorer.score(texts))
    rated = any(ranking.ratings for ranking in train_set)
    known = scorer.lexicon if scorer.lexicon.words else fit_lexicon(train_set)
    words, bigrams = (
        np.array(lexicon.score(texts)) if rated else None for lexicon in (known, fit_lexicon(train_set, bigrams=True))
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
