"""Train a reward model from people's ratings and rankings, on a masked or a causal model.

Run as `python -m tasks.reward ENTRY`. An entry of role `train` is the reward of alignment; an entry of role `judge` is
trained on other rankings and measures what alignment gained. The model reads the reply, with or without its prompt, and
returns one score on the raters' scale. The loss is `mse_weight x squared error to the mean rating + ordering.weight x
Bradley–Terry loss over the pairs of a ranking` (Stiennon et al. 2020, "Learning to summarize from human feedback",
equation 1); a ranking with ranks but no scores has only the second term.

With `lexicon`, the score is the sum of a linear model of the reply's whole words, fitted first, and the model's output
(Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems").
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.common import tables
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import head_models, methods, models, torch_setup
from tasks.common.modelling.methods import Full, Head, Lora, TopLayers
from tasks.common.random_streams import Stream, generator
from tasks.common.reward import agreement
from tasks.common.reward.frozen import FrozenBackbone
from tasks.common.reward.rankings import (
    ROLES,
    Ranking,
    Role,
    rating_scale,
    read_ranking,
    rows_for_role,
    split_control_tokens,
)
from tasks.common.reward.scoring import RewardInput, Scorer
from tasks.common.settings import Settings
from tasks.common.text import chat
from tasks.common.training import losses
from tasks.common.training.loop import MAX_LISTED_ITEMS, MicroBatch, Shard, Training, batch_at, last_losses, train
from tasks.reward.bases import fit_bases, fit_lexicon, mostly_rated
from tasks.reward.rejected import (
    alike_ids,
    check_differences,
    has_something_to_learn,
    report_alike,
    report_control_tokens,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {"model": "{config.model}", "rankings": "data/validate/rankings"}
OUTPUTS = {"model": "data/reward/{key}/model", "history": "data/reward/{key}/history.csv"}
PARALLEL = True

# Training responses whose scores give the normalization: the standard error of their mean is 4 % of their deviation.
MAX_NORMALIZATION_RESPONSES = 512


class Pairwise(Settings):
    """Bradley–Terry loss over every ordered pair of a ranking."""

    name: Literal["bradley_terry"] = Field(description="Loss over a ranking's order")
    weight: float = Field(default=1.0, description="Weight of the loss", ge=0)
    margin: float = Field(default=0.0, description="Required score margin per rating point between two responses", ge=0)


class Listwise(Settings):
    """Plackett–Luce loss: a ranking as successive choices of the best remaining response."""

    name: Literal["plackett_luce"] = Field(description="Loss over a ranking's order")
    weight: float = Field(default=1.0, description="Weight of the loss", ge=0)


class Config(Training):
    """Settings of the reward model."""

    role: Role = Field(description="train: the reward of alignment; judge: measures what alignment gained")
    model: str = Field(description="Folder of the model that the head is put on: an entry's, or your own", min_length=1)
    chat_template: chat.TemplateName = None
    method: Annotated[
        Full | TopLayers | Lora | Head, Field(discriminator="name", description="Which weights are trained")
    ] = Full(name="full")
    input: RewardInput = Field(
        default="conversation", description="The response alone, or the whole conversation up to it"
    )
    heads: int = Field(
        default=1,
        description="Heads on the model; their mean is the score. Several heads train on bootstrapped rankings",
        ge=1,
        le=64,
    )
    judge_share: float = Field(
        default=0.3,
        description="Share of the training rankings reserved for judges; the same in all entries",
        ge=0,
        lt=1,
    )
    mse_weight: float = Field(default=1.0, description="Weight of the mean squared error to the mean rating", ge=0)
    ordering: Annotated[Pairwise | Listwise, Field(discriminator="name", description="Loss over people's order")] = (
        Pairwise(name="bradley_terry")
    )
    lexicon: bool = Field(default=False, description="Add a linear model of whole words; the model learns its residual")
    max_tokens: int = Field(
        description="Tokens that the model reads; the lexicon counts words of the whole reply", ge=8
    )
    word_dropout: float = Field(
        default=0.0,
        description="Share of the tokens masked in training, against memorizing replies",
        ge=0,
        lt=1,
    )
    batch: int = Field(description="Rankings per step", ge=1)
    steps: int = Field(
        description="Optimizer steps of the role train; a judge takes fewer, in proportion to its rankings", ge=1
    )

    @model_validator(mode="after")
    def _check_loss_weights(self) -> "Config":
        if not self.mse_weight and not self.ordering.weight:
            raise ValueError(
                "mse_weight and ordering.weight are both 0, so there is no loss; give one of them a weight above 0"
            )
        return self

    @model_validator(mode="after")
    def _check_word_dropout(self) -> "Config":
        if self.method.name == "head" and self.word_dropout:
            raise ValueError(
                f"method head reads each response once, and word_dropout ({self.word_dropout}) would mask other tokens "
                "of it in every step; set it to 0, or use the method top_layers"
            )
        return self


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the reward model; return its pairwise accuracy on held-out rankings and that of bag-of-words baselines."""
    torch_setup.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"], config.chat_template)
    if config.word_dropout and tokenizer.mask_token_id is None:
        raise StageError(
            f"reward.word_dropout is {config.word_dropout}, but the model's tokenizer has no mask token; set it to 0."
        )
    rows, with_control_tokens = split_control_tokens(tables.read(job.inputs["rankings"]).to_pylist(), tokenizer)
    report_control_tokens(with_control_tokens)
    scale = rating_scale(rows)
    train_rows = [row for row in rows if row["split"] == "train"]
    rows_by_role = {role: rows_for_role(train_rows, role, config.judge_share, config.input) for role in ROLES}
    with models.suppress_warnings("transformers"):  # responses longer than the model's context are truncated
        train_set, heldout = (
            [read_ranking(row, tokenizer, config.max_tokens, config.input, lexicon=config.lexicon) for row in found]
            for found in (rows_by_role[config.role], [row for row in rows if row["split"] == "heldout"])
        )
    report_truncated((*train_set, *heldout), config.max_tokens)
    check_training_rankings(config, job, train_rows, train_set)
    check_differences(train_set, rows_by_role[config.role], tokenizer, config.max_tokens)
    report_alike((*train_set, *heldout), config.max_tokens)
    alike, alike_rankings = sum(ranking.alike for ranking in (*train_set, *heldout)), alike_ids((*train_set, *heldout))
    train_set = list(filter(has_something_to_learn, train_set))
    if config.role == "judge":
        config = scale_judge_steps(config, *(len(rows_by_role[role]) for role in ROLES))
    with models.suppress_warnings("transformers"):  # the warning that the head is newly initialized
        model = new_scorer(config, job)
    model.config.pad_token_id = tokenizer.pad_token_id
    lexicon, bases = fit_bases(train_set, config.lexicon)
    if not config.mse_weight or (config.lexicon and not mostly_rated(train_set)):
        scale = None  # scores are logits then; the raters' scale does not bound them
    trained = methods.apply(model, config.method)
    frozen = FrozenBackbone(trained, tokenizer, job.numerics) if isinstance(config.method, Head) else None
    objective = RankingObjective(config, job, trained, tokenizer, train_set, bases, frozen=frozen)
    trained, history = train(trained, objective, config, job)
    model = methods.merge(trained, config.method)
    scorer = Scorer(model, tokenizer, lexicon, scale, config.max_tokens, config.input, job.numerics, frozen=frozen)
    scorer = replace(scorer, score_mean_std=score_statistics(scorer, train_set, f"{job.name} training scores"))
    scorer.save(job.outputs["model"])
    history.write(job.outputs["history"])
    bag_of_words = lexicon if lexicon.words else fit_lexicon(train_set)
    baselines = {"bag_of_words": bag_of_words, "bag_of_words_and_bigrams": fit_lexicon(train_set, bigrams=True)}
    truncated = [ranking for ranking in (*train_set, *heldout) if ranking.truncated]
    agreement_metrics = agreement.pairwise_agreement(
        scorer,
        heldout,
        {name: baseline if baseline.words else None for name, baseline in baselines.items()},
        f"{job.name} held-out",
    )
    return {
        "accuracy": agreement.headline(agreement_metrics).get("model"),
        "rankings": len(train_set),
        "rankings_in_no_role": len(train_rows) - sum(map(len, rows_by_role.values())),
        "truncated_responses": sum(ranking.truncated for ranking in truncated),
        "truncated_rankings": [ranking.id for ranking in truncated[:MAX_LISTED_ITEMS]],
        "alike_pairs": alike,
        "alike_rankings": alike_rankings[:MAX_LISTED_ITEMS],
        "control_token_rankings": with_control_tokens,
        "score_mean_std": scorer.score_mean_std,
        **last_losses(history),
        **agreement_metrics,
    }


def report_truncated(rankings: Sequence[Ranking], max_tokens: int) -> None:
    """Print how many responses are truncated, which a user who compares long answers would not expect."""
    truncated, count = sum(ranking.truncated for ranking in rankings), sum(len(ranking.texts) for ranking in rankings)
    if truncated:
        print(
            f"{truncated} of {count} responses have more than the {max_tokens} tokens of reward.max_tokens and are "
            "truncated"
        )


def new_scorer(config: Config, job: Job) -> "PreTrainedModel":
    """Return the model to train, with newly initialized heads; with method `head`, one that returns their features."""
    feature_options: dict[str, Any] = {}
    if isinstance(config.method, Head):
        feature_options = {"layers": config.method.layers, "token_level": config.method.pooling == "mean"}
    return head_models.new_scorer(job.inputs["model"], job.numerics, config.heads, **feature_options)


def scale_judge_steps(config: Config, trains: int, judges: int) -> Config:
    """Return the config with steps scaled by `judges / trains`, so that judge and train entries run the same epochs.

    With unscaled steps a judge, which has three in ten rankings by default, would memorize them.
    """
    return config.model_copy(update={"steps": max(1, round(config.steps * judges / max(trains, 1)))})


def check_training_rankings(config: Config, job: Job, rows: Sequence[Any], train_set: Sequence[Ranking]) -> None:
    """Raise StageError if the entry has no rankings to train on, or has rankings that no weighted loss uses."""
    if not rows:
        raise StageError(
            "no ranking is left to train on; data/validate/rejected/rankings lists the rejected rows and their reasons."
        )
    if not train_set:
        remedy = "Lower" if config.role == "train" else "Raise"
        raise StageError(
            f"none of the {len(rows)} training rankings is assigned to {job.name}, whose role is {config.role} "
            f"(judge_share is {config.judge_share:g}). {remedy} judge_share, or collect more rankings."
        )
    unrated = sum(ranking.ratings is None for ranking in train_set)
    if unrated and not config.ordering.weight:
        raise StageError(
            f"{unrated} rankings have ranks and no scores, which only the loss reward.ordering uses; raise its weight "
            "from 0."
        )


class RankingObjective:
    """People's ratings and rankings as the training objective."""

    static_shapes = None  # the content is rankings, not tensors

    def __init__(
        self, config: Config, job: Job, model: Any, tokenizer: "PreTrainedTokenizerFast",
        rankings: Sequence[Ranking], bases: Sequence[list[float]], *, frozen: FrozenBackbone | None = None,
    ) -> None:  # fmt: skip
        terms = {"rating": config.mse_weight, "ordering": config.ordering.weight}
        self.weights = {name: weight for name, weight in terms.items() if weight}
        self.config, self.job, self.model, self.tokenizer, self.frozen = config, job, model, tokenizer, frozen
        if frozen:
            frozen.cache_states([ids for ranking in rankings for ids in ranking.ids], chat.MICROBATCH_ROWS)
        counts = bootstrap_counts(len(rankings), config.heads, job.seed)
        self.items = list(zip(rankings, bases, counts, strict=True))

    def draw(self, step: int, shard: Shard) -> MicroBatch:
        """Return a shard of a step's rankings with their base scores and bootstrap counts, some tokens masked."""
        random = generator(self.job.seed, Stream.WORD_DROPOUT, step)
        mask_share, mask = self.config.word_dropout, self.tokenizer.mask_token_id
        batch = batch_at(self.items, self.config.batch, self.job.seed, step)
        part = [(mask_tokens(ranking, mask_share, mask, random), base, counts) for ranking, base, counts in batch][
            shard.rows
        ]
        targets = {
            "rating": sum(sum(counts) * len(ranking.ratings or ()) for ranking, _, counts in part),
            "ordering": sum(sum(counts) * self._comparison_count(ranking) for ranking, _, counts in part),
        }
        tokens = sum(len(ids) for ranking, *_ in part for ids in ranking.ids)
        return MicroBatch(part, targets, tokens, [f"ranking {ranking.id}" for ranking, *_ in part])

    def _comparison_count(self, ranking: Ranking) -> int:
        listwise = isinstance(self.config.ordering, Listwise)
        return sum(map(len, ranking.order[:-1])) if listwise else len(ranking.pairs)

    def loss_sums(self, micro_batch: MicroBatch) -> dict[str, "torch.Tensor"]:
        """Return the summed squared error to the mean ratings, and the summed loss over the orders, of all heads."""
        batch: Sequence[tuple[Ranking, list[float], list[int]]] = micro_batch.inputs
        rows = [ids for ranking, *_ in batch for ids in ranking.ids]
        rows_per_pass = len(rows) if self.job.numerics.parallel.lockstep else chat.MICROBATCH_ROWS
        if self.frozen:
            head_scores = self.frozen.outputs(rows, rows_per_pass)  # (N, heads)
        else:
            head_scores = head_models.head_outputs(self.model, self.tokenizer, rows, self.job.numerics, rows_per_pass)
        head_scores = head_scores + head_scores.new_tensor([value for _, base, _ in batch for value in base])[:, None]
        starts = np.cumsum([0, *(len(ranking.ids) for ranking, *_ in batch)]).tolist()
        sums = {"rating": head_scores.sum() * 0, "ordering": head_scores.sum() * 0}
        for head, scores in enumerate(head_scores.unbind(1)):
            head_rankings = [
                (at, ranking)
                for at, (ranking, _, counts) in zip(starts, batch, strict=False)
                for _ in range(counts[head])
            ]
            rated_responses = [
                (at + i, value) for at, ranking in head_rankings for i, value in enumerate(ranking.ratings or ())
            ]
            indices, values = [index for index, _ in rated_responses], [value for _, value in rated_responses]
            sums["rating"] = sums["rating"] + losses.squared_error(scores[indices], scores.new_tensor(values))
            sums["ordering"] = sums["ordering"] + self._ordering_loss(scores, head_rankings)
        return sums

    def _ordering_loss(self, scores: "torch.Tensor", head_rankings: Sequence[tuple[int, Ranking]]) -> "torch.Tensor":
        ordering = self.config.ordering
        if isinstance(ordering, Listwise):
            orders = [[[at + i for i in group] for group in ranking.order] for at, ranking in head_rankings]
            return losses.plackett_luce(scores, orders)
        pairs = [(at + i, at + j, gap) for at, ranking in head_rankings for i, j, gap in ranking.pairs]
        return losses.bradley_terry(scores, pairs, ordering.margin)


def bootstrap_counts(rankings: int, heads: int, seed: int) -> list[list[int]]:
    """Return how often each head trains on each ranking, shape (rankings, heads); 1 for a single head.

    Each of several heads has its own bootstrap sample (Breiman 1996, "Bagging predictors").
    """
    if heads == 1:
        return [[1]] * rankings
    random = generator(seed, Stream.HEAD_RANKINGS)
    columns = [np.bincount(random.integers(rankings, size=rankings), minlength=rankings) for _ in range(heads)]
    counts: list[list[int]] = np.stack(columns, axis=1).tolist()
    return counts


def score_statistics(scorer: Scorer, train_set: Sequence[Ranking], desc: str | None = None) -> list[float]:
    """Return mean and standard deviation of the training responses' scores, evenly subsampled if there are many.

    `desc` is the title of the progress bar; without it none is shown.
    """
    exchanges = [exchange for ranking in train_set for exchange in ranking.exchanges]
    scores = scorer.score(exchanges[:: -(-len(exchanges) // MAX_NORMALIZATION_RESPONSES)], desc=desc)
    return [round(float(np.mean(scores)), 6), round(float(np.std(scores)), 6) or 1.0]


def mask_tokens(ranking: Ranking, share: float, mask: int, random: np.random.Generator) -> Ranking:
    """Return a ranking with a random share of the responses' tokens replaced by the mask token."""
    if not share:
        return ranking
    masked_ids = [[ids[0], *(mask if random.random() < share else token for token in ids[1:])] for ids in ranking.ids]
    return replace(ranking, ids=masked_ids)
