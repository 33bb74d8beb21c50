"""Train a reward model from people's ratings and rankings, on the masked encoder or on the tuned decoder.

Run as `python -m tasks.reward KEY`: `policy` is the one that PPO learns from, `judge` one that is trained on rankings
of its own and says what PPO gained. The model reads a reply, or the prompt too, and returns one number on the raters'
scale. Its loss is `rating x mean squared error to the mean rating + ordering x Bradley–Terry loss over the pairs of a
ranking` (Stiennon et al. 2020, "Learning to summarize from human feedback", equation 1); a ranking that holds ranks and
no scores has only the second term.

With `words`, the number is the sum of a linear rating of the reply's whole words and of what the model adds to it, as
in Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems". The words are solved for first.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.common import stage, tables
from tasks.common.evaluation import agreement
from tasks.common.evaluation.rankings import Ranking, raters_scale, read_ranking, share_of
from tasks.common.evaluation.scoring import Reads, Scorer
from tasks.common.modelling import methods, models
from tasks.common.modelling.frozen import Frozen
from tasks.common.modelling.methods import Full, Head, Lora, Top
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.training import losses
from tasks.common.training.bases import fit_lexicon, mostly_rated, with_bases
from tasks.common.training.loop import NAMED, Drawn, Share, Training, batch_at, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {"model": "{config.model}", "rankings": "data/validate/rankings"}
KEY_INPUTS: dict[str, dict[str, str]] = {"policy": {}, "judge": {}}
OUTPUTS = {"model": "data/reward/{key}/model", "history": "data/reward/{key}/history.csv"}
PARALLEL = True

NORMALISED_ON = 8192  # responses of training at most, by whose scores rewards are normalised


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

    model: Literal["data/pretrain/mlm/model", "data/finetune/model", "data/ingest/checkpoint"] = Field(
        description="Model that the head is put on"
    )
    method: Annotated[Full | Top | Lora | Head, Field(discriminator="name", description="What of the model is trained")]
    reads: Reads = Field(description="The response alone, or the whole conversation up to it")
    heads: int = Field(
        description="Heads on the model, whose mean is the score; several learn from bootstrapped rankings", ge=1, le=64
    )
    judge_share: float = Field(
        description="Share of the training rankings that the judge learns from, and only the judge", gt=0, lt=1
    )
    rating: float = Field(description="Weight of the mean squared error to the mean rating", ge=0)
    ordering: Annotated[Pairwise | Listwise, Field(discriminator="name")]
    words: bool = Field(description="Add a linear rating of whole words, of which the model learns what is missing")
    max_tokens: int = Field(description="Tokens that the model reads; words count over all of a reply", ge=8)
    word_dropout: float = Field(
        description="Share of the tokens that training hides, against learning replies by heart", ge=0, lt=1
    )
    batch: int = Field(description="Rankings a step", ge=1)
    steps: int = Field(description="Optimizer steps; the judge's are fewer, as its rankings are", ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if not self.rating and not self.ordering.weight:
            raise ValueError(
                "rating and ordering.weight are both 0, so nothing would be learnt; give one of them a weight"
            )
        if self.method.name == "head" and self.word_dropout:
            raise ValueError(
                f"method head reads each response once, and word_dropout ({self.word_dropout}) would hide other tokens "
                "of it in every step; set it to 0, or take the method top"
            )
        return self


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
    train_rows = [row for row in rows if row["split"] == "train"]
    shares = {key: share_of(train_rows, key, config.judge_share, config.reads) for key in KEY_INPUTS}
    with models.quiet("transformers"):  # what is longer than the model's context is cut
        train_set, heldout = (
            [read_ranking(row, tokenizer, config.max_tokens, config.reads) for row in found]
            for found in (shares[str(job.key)], [row for row in rows if row["split"] == "heldout"])
        )
    tell_cut((*train_set, *heldout), config.max_tokens)
    refuse_too_little(config, job, train_rows, train_set)
    if job.key == "judge":
        config = as_often_read(config, *(len(shares[key]) for key in ("policy", "judge")))
    with models.quiet("transformers"):  # the head is fresh, and is about to be trained
        model = new_scorer(config, job)
    model.config.pad_token_id = tokenizer.pad_token_id
    lexicon, known = with_bases(train_set, config.words)
    if not config.rating or (config.words and not mostly_rated(train_set)):
        scale = None  # a score is then a logit, of which the raters' scale is no bound
    trained = methods.apply(model, config.method)
    frozen = Frozen(trained, tokenizer, job.numerics) if isinstance(config.method, Head) else None
    judgements = Judgements(config, job, trained, tokenizer, train_set, known, frozen=frozen)
    trained, history = train(trained, judgements, config, job)
    model = methods.merge(trained, config.method)
    scorer = Scorer(model, tokenizer, lexicon, scale, config.max_tokens, config.reads, job.numerics, frozen=frozen)
    scorer = replace(scorer, normal=normal(scorer, train_set))
    scorer.save(job.outputs["model"])
    history.write(job.outputs["history"])
    words = lexicon if lexicon.words else fit_lexicon(train_set)
    peers = {"bag_of_words": words, "bag_of_words_and_bigrams": fit_lexicon(train_set, bigrams=True)}
    cut = [ranking for ranking in (*train_set, *heldout) if ranking.cut]
    return {
        "rankings": len(train_set),
        "rankings_of_neither": len(train_rows) - sum(map(len, shares.values())),
        "cut_responses": sum(ranking.cut for ranking in cut),
        "cut_in": [ranking.id for ranking in cut[:NAMED]],
        "normal": scorer.normal,
        **summary(history),
        **agreement.judge(scorer, heldout, {name: peer if peer.words else None for name, peer in peers.items()}),
    }


def tell_cut(rankings: Sequence[Ranking], most: int) -> None:
    """Say how many responses the model sees only a part of: who compares long answers would not expect it."""
    cut, count = sum(ranking.cut for ranking in rankings), sum(len(ranking.texts) for ranking in rankings)
    if cut:
        print(f"{cut} of {count} responses have more than the {most} tokens of reward.max_tokens and are read in part")


def new_scorer(config: Config, job: Job) -> "PreTrainedModel":
    """Return the model to train, with a fresh head; of one whose head alone is trained, what that reads."""
    kept: dict[str, Any] = {}
    if isinstance(config.method, Head):
        kept = {"layers": config.method.layers, "of_tokens": config.method.pooling == "mean"}
    return models.new_scorer(job.inputs["model"], job.numerics, config.heads, **kept)


def as_often_read(config: Config, policys: int, judges: int) -> Config:
    """Return the config with as many steps for the judge's rankings as for the policy's: each is read as often.

    With steps for all rankings a model of three in ten would learn them by heart.
    """
    return config.model_copy(update={"steps": max(1, round(config.steps * judges / max(policys, 1)))})


def refuse_too_little(config: Config, job: Job, rows: Sequence[Any], train_set: Sequence[Ranking]) -> None:
    """Raise StageError where there is nothing to learn from, or nothing that the settings would learn."""
    if not rows:
        raise StageError(
            "no ranking is left to train on; see data/validate/refused/rankings for why rows were refused."
        )
    if not train_set:
        remedy = "Lower" if job.key == "policy" else "Raise"
        raise StageError(
            f"none of the {len(rows)} rankings to train on falls to {job.name} (reward.judge_share is "
            f"{config.judge_share:g}), and both it and the other reward model need some. {remedy} it, or gather more."
        )
    unrated = sum(ranking.ratings is None for ranking in train_set)
    if unrated and not config.ordering.weight:
        raise StageError(
            f"{unrated} rankings hold ranks and no scores, which only reward.ordering can learn from; its weight is 0."
        )


class Judgements:
    """What people said of replies, as the objective of the model."""

    steady = None  # rankings, whose orders no tensor holds

    def __init__(
        self, config: Config, job: Job, model: Any, tokenizer: "PreTrainedTokenizerFast",
        rankings: Sequence[Ranking], bases: Sequence[list[float]], *, frozen: Frozen | None = None,
    ) -> None:  # fmt: skip
        terms = {"rating": config.rating, "ordering": config.ordering.weight}
        self.weights = {name: weight for name, weight in terms.items() if weight}
        self.config, self.job, self.model, self.tokenizer, self.frozen = config, job, model, tokenizer, frozen
        if frozen:
            frozen.read([ids for ranking in rankings for ids in ranking.ids], chat.TOGETHER)
        counts = bootstrapped(len(rankings), config.heads, job.seed)
        self.items = list(zip(rankings, bases, counts, strict=True))

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's rankings with their bases and counts, some of their tokens hidden."""
        random = np.random.default_rng([self.job.seed, step, 1])
        hide, mask = self.config.word_dropout, self.tokenizer.mask_token_id
        batch = batch_at(self.items, self.config.batch, self.job.seed, step)
        part = [(hide_words(ranking, hide, mask, random), base, counts) for ranking, base, counts in batch][share.rows]
        targets = {
            "rating": sum(sum(counts) * len(ranking.ratings or ()) for ranking, _, counts in part),
            "ordering": sum(sum(counts) * self._choices(ranking) for ranking, _, counts in part),
        }
        tokens = sum(len(ids) for ranking, *_ in part for ids in ranking.ids)
        return Drawn(part, targets, tokens, [f"ranking {ranking.id}" for ranking, *_ in part])

    def _choices(self, ranking: Ranking) -> int:
        listwise = isinstance(self.config.ordering, Listwise)
        return sum(map(len, ranking.order[:-1])) if listwise else len(ranking.pairs)

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed squared error to the mean ratings, and the summed loss over the orders, of all heads."""
        batch: Sequence[tuple[Ranking, list[float], list[int]]] = drawn.content
        rows = [ids for ranking, *_ in batch for ids in ranking.ids]
        together = len(rows) if self.job.numerics.parallel.in_step else chat.TOGETHER
        if self.frozen:
            found = self.frozen.outputs(rows, together)  # (N, heads)
        else:
            found = models.head_outputs(self.model, self.tokenizer, rows, self.job.numerics, together)
        found = found + found.new_tensor([value for _, base, _ in batch for value in base])[:, None]
        starts = np.cumsum([0, *(len(ranking.ids) for ranking, *_ in batch)]).tolist()
        sums = {"rating": found.sum() * 0, "ordering": found.sum() * 0}
        for head, scores in enumerate(found.unbind(1)):
            placed = [
                (at, ranking)
                for at, (ranking, _, counts) in zip(starts, batch, strict=False)
                for _ in range(counts[head])
            ]
            rated = [(at + i, value) for at, ranking in placed for i, value in enumerate(ranking.ratings or ())]
            places, values = [place for place, _ in rated], [value for _, value in rated]
            sums["rating"] = sums["rating"] + losses.squared_error(scores[places], scores.new_tensor(values))
            sums["ordering"] = sums["ordering"] + self._ordering(scores, placed)
        return sums

    def _ordering(self, scores: "torch.Tensor", placed: Sequence[tuple[int, Ranking]]) -> "torch.Tensor":
        ordering = self.config.ordering
        if isinstance(ordering, Listwise):
            orders = [[[at + i for i in group] for group in ranking.order] for at, ranking in placed]
            return losses.plackett_luce(scores, orders)
        pairs = [(at + i, at + j, gap) for at, ranking in placed for i, j, gap in ranking.pairs]
        return losses.bradley_terry(scores, pairs, ordering.margin)


def bootstrapped(rankings: int, heads: int, seed: int) -> list[list[int]]:
    """Return how often each head learns from each ranking, shape (rankings, heads); a single head does once from each.

    Of several each has a sample of its own, drawn with replacement (Breiman 1996, "Bagging predictors").
    """
    if heads == 1:
        return [[1]] * rankings
    random = np.random.default_rng([seed, 6])
    drawn = [np.bincount(random.integers(rankings, size=rankings), minlength=rankings) for _ in range(heads)]
    counts: list[list[int]] = np.stack(drawn, axis=1).tolist()
    return counts


def normal(scorer: Scorer, train_set: Sequence[Ranking]) -> list[float]:
    """Return the mean and the standard deviation of the scores of the training responses, evenly chosen if many."""
    exchanges = [exchange for ranking in train_set for exchange in ranking.exchanges]
    scores = scorer.score(exchanges[:: -(-len(exchanges) // NORMALISED_ON)])
    return [round(float(np.mean(scores)), 6), round(float(np.std(scores)), 6) or 1.0]


def hide_words(ranking: Ranking, share: float, mask: int, random: np.random.Generator) -> Ranking:
    """Return a ranking in which a share of the responses' tokens, chosen at random, is replaced by the mask token."""
    if not share:
        return ranking
    hidden = [[ids[0], *(mask if random.random() < share else token for token in ids[1:])] for ids in ranking.ids]
    return replace(ranking, ids=hidden)


if __name__ == "__main__":
    stage.main("tasks.reward")
