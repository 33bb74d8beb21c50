"""Structured pruning: remove a model's least important feed-forward neurons, then recover by distillation.

Run as `python -m tasks.prune ENTRY`. A neuron's importance is the first-order estimate of the squared change of the
loss if it is removed (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8), or the
norm of its weights. Neurons are removed from the matrices, so the model becomes smaller. The output weights of the kept
neurons are refitted by least squares to reconstruct the layer's output (He et al. 2017, "Channel Pruning for
Accelerating Very Deep Neural Networks", eq. 1). Recovery is distillation (Hinton et al. 2015): the pruned model learns
the next-token distribution of the original model, the teacher, on the teacher's replies and on text of the corpus.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tasks.common import tables
from tasks.common.generation import sampling
from tasks.common.harness import execution
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import models, torch_setup
from tasks.common.modelling.feed_forwards import GATED_MATRICES, feed_forwards
from tasks.common.random_streams import Stream, derive_seed, generator
from tasks.common.text import chat
from tasks.common.text.mixtures import Mixture, Weights
from tasks.common.text.shards import Split
from tasks.common.training.loop import FULL_BATCH, MicroBatch, Shard, Training, last_losses, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {
    "model": "{config.model}",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {"model": "data/prune/{key}/model", "history": "data/prune/{key}/history.csv"}
PARALLEL = True

RIDGE_RATIO = 1e-3  # relative to the mean second moment; keeps the least squares well-posed if neurons are collinear
TokenBatch = tuple["torch.Tensor", "torch.Tensor"]  # token ids and attention mask, each (B, T)


class Config(Training):
    """Settings of pruning."""

    model: str = Field(description="Folder of the model to prune: an entry's, or your own", min_length=1)
    chat_template: chat.TemplateName = None
    sources: tables.SourceNames = None
    importance: Literal["taylor", "magnitude"] = Field(default="taylor", description="Importance score of neurons")
    keep: float = Field(description="Share of the feed-forward neurons to keep", gt=0, le=1)
    calibration: int = Field(default=8, description="Batches for measuring importance", ge=1)
    replies: int = Field(description="Replies of the original model for the distillation", ge=1)
    max_new_tokens: int = Field(description="Longest such reply (tokens)", ge=1)
    batch: int = Field(description="Replies per step", ge=1)
    windows: int = Field(description="Windows of the corpus per step; 0 for none", ge=0)
    window: int = Field(description="Length of such a window (tokens)", ge=16)
    mixture: Weights
    steps: int = Field(description="Optimizer steps of the recovery", ge=0)


def run(config: Config, job: Job) -> dict[str, Any]:
    """Prune, recover, and return the sizes and the final divergence from the original model."""
    torch_setup.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"], config.chat_template)
    teacher = models.load_decoder(job.inputs["model"], job.numerics).eval()
    check_gated_layers(teacher)
    batches = RecoveryBatches(config, job, teacher, tokenizer)
    keep = max(1, round(config.keep * teacher.config.intermediate_size))
    before = models.parameter_count(teacher)
    calibration = [part for step in range(config.calibration) for part in batches.at(step)]
    kept = select_neurons(importance(teacher, config.importance, calibration), keep)
    pruned = models.load_decoder(job.inputs["model"], job.numerics)
    reconstruct(pruned, kept, second_moments(teacher, calibration))
    remove_neurons(pruned, kept)

    pruned, history = train(pruned, Recovery(pruned, teacher, batches, job), config, job)
    models.save(pruned, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    after = models.parameter_count(pruned)
    return {
        "parameters_before": before,
        "parameters": after,
        "removed": round(1 - after / before, 4),
        "feed_forward": keep,
        **last_losses(history),
    }


def check_gated_layers(model: "PreTrainedModel") -> None:
    """Raise StageError for a model without gated feed-forward layers like Llama's."""
    if not feed_forwards(model):
        raise StageError(
            f"prune removes neurons of gated feed-forward layers ({', '.join(GATED_MATRICES)}), and a "
            f"{type(model).__name__} has none; use a model with Llama's architecture, or remove the entry."
        )


class RecoveryBatches:
    """The teacher's replies to training questions, and pretraining windows; a batch is a pure function of the step."""

    def __init__(
        self, config: Config, job: Job, teacher: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"
    ) -> None:
        rows = tables.read(job.inputs["instructions"], "train", config.sources).to_pylist()
        questions = chat.drop_too_long(tokenizer, chat.unique_questions(tokenizer, rows), config.max_new_tokens)
        chosen = generator(job.seed, Stream.PRUNING_PROMPTS).choice(len(questions), config.replies)
        prompts = [questions[i].ids for i in chosen]
        replies = sampling.generate_replies(
            teacher,
            tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=1.0,
            seed=derive_seed(job.seed, Stream.PRUNING_REPLIES),
            numerics=job.numerics,
            desc=f"{job.name} replies",
        )
        self.rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
        self.mixture: Mixture | None = None
        if config.windows:
            split = Split.open(job.inputs["shards"] / "train")
            self.mixture = Mixture(split, config.window, config.windows, config.mixture, job.seed)
        self.config, self.seed, self.pad, self.device = config, job.seed, tokenizer.pad_token_id, teacher.device

    def at(self, step: int, shard: Shard = FULL_BATCH) -> list[TokenBatch]:
        """Return a shard of a step's replies, in groups of similar length, and of its pretraining windows."""
        chosen = generator(self.seed, Stream.PRUNING_BATCHES, step).integers(len(self.rows), size=self.config.batch)
        replies = [self.rows[i] for i in chosen][shard.rows]
        groups = [[replies[i] for i in group] for group in chat.length_buckets(replies)]
        windows = self.mixture.batch(step, shard.rows).tolist() if self.mixture else []
        return [chat.pad_batch(rows, self.pad, self.device) for rows in (*groups, windows) if rows]


class Recovery:
    """Distillation: the teacher's next-token distribution as the training objective."""

    weights: ClassVar = {"divergence": 1.0}
    static_shapes = False

    def __init__(
        self, pruned: "PreTrainedModel", teacher: "PreTrainedModel", batches: RecoveryBatches, job: Job
    ) -> None:
        self.pruned, self.teacher, self.batches, self.job = pruned, teacher, batches, job

    def draw(self, step: int, shard: Shard) -> MicroBatch:
        """Return a shard of a step's replies and windows."""
        groups = self.batches.at(step, shard)
        target_tokens = sum(int(mask[:, 1:].sum()) for _, mask in groups)
        return MicroBatch(
            groups, {"divergence": target_tokens}, sum(int(mask.sum()) for _, mask in groups), [f"recovery {step}"]
        )

    def loss_sums(self, micro_batch: MicroBatch) -> dict[str, "torch.Tensor"]:
        """Return the summed KL divergence from the teacher's distribution."""
        return {"divergence": divergence(self.pruned, self.teacher, micro_batch.inputs, self.job)}


def importance(model: "PreTrainedModel", criterion: str, calibration: Sequence[TokenBatch]) -> list["torch.Tensor"]:
    """Return, for each layer, the importance of its feed-forward neurons, shape (feed_forward,)."""
    import torch

    layers = feed_forwards(model)
    if criterion == "magnitude":
        weights = [
            (m.gate_proj.weight.norm(dim=1), m.up_proj.weight.norm(dim=1), m.down_proj.weight.norm(dim=0))
            for m in layers
        ]
        return [(gate * up * down).detach() for gate, up, down in weights]
    gates = [torch.ones(model.config.intermediate_size, device=model.device, requires_grad=True) for _ in layers]
    hooks = [
        mlp.down_proj.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
        for mlp, gate in zip(layers, gates, strict=True)
    ]
    scores = [torch.zeros_like(gate) for gate in gates]
    for ids, mask in calibration:
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        for score, gradient in zip(scores, torch.autograd.grad(loss, gates), strict=True):
            score += gradient.square()
    for hook in hooks:
        hook.remove()
    return scores


def second_moments(model: "PreTrainedModel", calibration: Sequence[TokenBatch]) -> list["torch.Tensor"]:
    """Return, for each layer, the second moments of its F feed-forward neurons, summed over tokens, (F, F) float64."""
    import torch

    layers = [layer.down_proj for layer in feed_forwards(model)]
    moments = [torch.zeros(layer.in_features, layer.in_features, device=model.device) for layer in layers]

    def accumulate(moment: "torch.Tensor", states: "torch.Tensor") -> None:
        activations = states[mask.bool()]  # (tokens, F)
        moment += activations.T @ activations

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, moment=moment: accumulate(moment, args[0]))
        for layer, moment in zip(layers, moments, strict=True)
    ]
    with torch.no_grad():
        for ids, mask in calibration:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [moment.double() for moment in moments]


def select_neurons(scores: Sequence["torch.Tensor"], keep: int) -> list["torch.Tensor"]:
    """Return, for each layer, the indices of its `keep` most important neurons, ascending."""
    return [score.topk(keep).indices.sort().values for score in scores]


def reconstruct(model: "PreTrainedModel", kept: Sequence["torch.Tensor"], moments: Sequence["torch.Tensor"]) -> None:
    """Refit, in each layer, the output weights of the kept neurons to reconstruct the layer's output.

    The output matrix W of the neurons x is replaced by the W' that minimizes the mean of |W x - W' x_kept|².
    """
    import torch

    for layer, kept_indices, moment in zip(feed_forwards(model), kept, moments, strict=True):
        down_weight = layer.down_proj.weight.detach()  # (H, F)
        ridge = (
            RIDGE_RATIO
            * moment.diagonal().mean()
            * torch.eye(len(kept_indices), dtype=moment.dtype, device=moment.device)
        )
        solved = torch.linalg.solve(
            moment[kept_indices][:, kept_indices] + ridge, moment[kept_indices] @ down_weight.to(moment).T
        )  # (keep, H)
        down_weight[:, kept_indices] = solved.T.to(down_weight)


def remove_neurons(model: "PreTrainedModel", kept: Sequence["torch.Tensor"]) -> "PreTrainedModel":
    """Remove the neurons that are not in `kept` from the model's matrices and return the model."""
    import torch

    for mlp, kept_indices in zip(feed_forwards(model), kept, strict=True):
        for matrix in (mlp.gate_proj, mlp.up_proj):
            matrix.weight = torch.nn.Parameter(matrix.weight.detach()[kept_indices].clone())
            if matrix.bias is not None:
                matrix.bias = torch.nn.Parameter(matrix.bias.detach()[kept_indices].clone())
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:, kept_indices].clone())
        keep = len(kept_indices)
        mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = mlp.intermediate_size = keep
        model.config.intermediate_size = keep
    return model


def divergence(
    pruned: "PreTrainedModel", teacher: "PreTrainedModel", batch: Sequence[TokenBatch], job: Job
) -> "torch.Tensor":
    """Return the KL divergence (nats) of the pruned model's next-token distribution from the teacher's, summed."""
    import torch

    total = torch.zeros((), device=teacher.device)
    for ids, mask in batch:
        with models.autocast(teacher, job.numerics):
            with torch.no_grad():
                target = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logits = pruned(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = mask[:, 1:].bool()
        student_logp, teacher_logp = (torch.log_softmax(part[:, :-1][targets].float(), -1) for part in (logits, target))
        total = total + torch.nn.functional.kl_div(student_logp, teacher_logp, log_target=True, reduction="sum")
    return total


if __name__ == "__main__":
    execution.main("tasks.prune")
