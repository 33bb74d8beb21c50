"""Make the policy smaller: remove its least important feed-forward neurons and let the rest recover.

Run as `python -m tasks.prune`. A neuron's importance is the expected squared effect on the loss of taking it away, to
first order (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8), or the norm of its
weights. Neurons are cut out of the matrices, so the model really is smaller; those that stay take over what they can of
the others' work by least squares (He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", eq. 1).
Recovery is distillation (Hinton et al. 2015): the pruned model learns the policy's next-token distribution, on the
policy's own replies and on statements.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks.common import stage, tables
from tasks.common.evaluation import sampling
from tasks.common.modelling import models
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.text.shards import Mixture, Split, Weights
from tasks.common.training.loop import WHOLE, Drawn, Share, Training, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {
    "model": "data/ppo/model",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {"model": "data/prune/model", "history": "data/prune/history.csv"}
PARALLEL = True

RIDGE = 1e-3  # of a neuron's mean square; keeps the least squares well-posed where neurons say the same
Part = tuple["torch.Tensor", "torch.Tensor"]  # token ids and attention mask, each (B, T)


class Config(Training):
    """Settings of pruning."""

    importance: Literal["taylor", "magnitude"] = Field(description="How neurons are ranked")
    keep: float = Field(description="Share of the feed-forward neurons that stay", gt=0, le=1)
    calibration: int = Field(description="Batches that importance is measured on", ge=1)
    replies: int = Field(description="Replies of the policy that the pruned model learns from", ge=1)
    max_new_tokens: int = Field(description="Longest such reply, in tokens", ge=1)
    batch: int = Field(description="Replies a step", ge=1)
    windows: int = Field(description="Windows of pretraining text a step", ge=1)
    window: int = Field(description="Length of such a window, in tokens", ge=16)
    mixture: Weights
    steps: int = Field(description="Optimizer steps of the recovery", ge=0)


def run(config: Config, job: Job) -> dict[str, Any]:
    """Prune, recover and return sizes and the divergence from the policy that is left."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
    policy = models.load_decoder(job.inputs["model"], job.numerics).eval()
    refuse_other_layers(policy)
    batches = Batches(config, job, policy, tokenizer)
    keep = max(1, round(config.keep * policy.config.intermediate_size))
    before = models.parameters(policy)
    calibration = [part for step in range(config.calibration) for part in batches.at(step)]
    kept = most_important(importance(policy, config.importance, calibration), keep)
    pruned = models.load_decoder(job.inputs["model"], job.numerics)
    hand_over(pruned, kept, activations(policy, calibration))
    cut(pruned, kept)

    pruned, history = train(pruned, Recovery(pruned, policy, batches, job), config, job)
    models.save(pruned, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    after = models.parameters(pruned)
    return {
        "parameters_before": before,
        "parameters": after,
        "removed": round(1 - after / before, 4),
        "feed_forward": keep,
        **summary(history),
    }


def refuse_other_layers(policy: "PreTrainedModel") -> None:
    """Raise StageError for a model whose feed-forward layers are not gated as Llama's, of which neurons are cut."""
    if not models.feed_forwards(policy):
        raise StageError(
            f"prune cuts neurons of gated feed-forward layers ({', '.join(models.GATED)}), and a "
            f"{type(policy).__name__} has none; take a model built as Llama is, or end with `dvc repro ppo`."
        )


class Batches:
    """The policy's replies to training questions, and statements; a batch is a pure function of the step."""

    def __init__(
        self, config: Config, job: Job, policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"
    ) -> None:
        rows = tables.read(job.inputs["instructions"], "train").to_pylist()
        questions = chat.with_room(tokenizer, chat.questions(tokenizer, rows), config.max_new_tokens)
        chosen = np.random.default_rng([job.seed, 3]).choice(len(questions), config.replies)
        prompts = [questions[i].ids for i in chosen]
        replies = sampling.replies(
            policy,
            tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=1.0,
            seed=job.seed,
            numerics=job.numerics,
            desc=f"{job.name} replies",
        )
        self.rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
        split = Split.open(job.inputs["shards"] / "train")
        self.mixture = Mixture(split, config.window, config.windows, config.mixture, job.seed)
        self.config, self.seed, self.pad, self.device = config, job.seed, tokenizer.pad_token_id, policy.device

    def at(self, step: int, share: Share = WHOLE) -> list[Part]:
        """Return a share of a step's replies, in groups of like length, and of its windows of pretraining text."""
        chosen = np.random.default_rng([self.seed, step, 4]).integers(len(self.rows), size=self.config.batch)
        replies = [self.rows[i] for i in chosen][share.rows]
        groups = [[replies[i] for i in group] for group in chat.alike(replies)]
        windows = self.mixture.batch(step, share.rows).tolist()
        return [chat.padded(rows, self.pad, self.device) for rows in (*groups, windows) if rows]


class Recovery:
    """The policy's next-token distribution, as the objective of the pruned model."""

    weights: ClassVar = {"divergence": 1.0}
    steady = False

    def __init__(self, pruned: "PreTrainedModel", policy: "PreTrainedModel", batches: Batches, job: Job) -> None:
        self.pruned, self.policy, self.batches, self.job = pruned, policy, batches, job

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's replies and windows."""
        groups = self.batches.at(step, share)
        asked = sum(int(mask[:, 1:].sum()) for _, mask in groups)
        return Drawn(groups, {"divergence": asked}, sum(int(mask.sum()) for _, mask in groups), [f"recovery {step}"])

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed KL divergence from the policy's distribution."""
        return {"divergence": divergence(self.pruned, self.policy, drawn.content, self.job)}


def importance(policy: "PreTrainedModel", measure: str, calibration: Sequence[Part]) -> list["torch.Tensor"]:
    """Return, for each layer, the importance of its feed-forward neurons, shape (feed_forward,)."""
    import torch

    layers = models.feed_forwards(policy)
    if measure == "magnitude":
        weights = [
            (m.gate_proj.weight.norm(dim=1), m.up_proj.weight.norm(dim=1), m.down_proj.weight.norm(dim=0))
            for m in layers
        ]
        return [(gate * up * down).detach() for gate, up, down in weights]
    gates = [torch.ones(policy.config.intermediate_size, device=policy.device, requires_grad=True) for _ in layers]
    hooks = [
        mlp.down_proj.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
        for mlp, gate in zip(layers, gates, strict=True)
    ]
    scores = [torch.zeros_like(gate) for gate in gates]
    for ids, mask in calibration:
        labels = ids.masked_fill(mask == 0, -100)
        loss = policy(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        for score, gradient in zip(scores, torch.autograd.grad(loss, gates), strict=True):
            score += gradient.square()
    for hook in hooks:
        hook.remove()
    return scores


def activations(policy: "PreTrainedModel", calibration: Sequence[Part]) -> list["torch.Tensor"]:
    """Return, for each layer, the second moments of its feed-forward neurons, summed over tokens: (F, F) in float64."""
    import torch

    layers = [layer.down_proj for layer in models.feed_forwards(policy)]
    moments = [torch.zeros(layer.in_features, layer.in_features, device=policy.device) for layer in layers]

    def watch(moment: "torch.Tensor", states: "torch.Tensor") -> None:
        seen = states[mask.bool()]  # (tokens, F)
        moment += seen.T @ seen

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, moment=moment: watch(moment, args[0]))
        for layer, moment in zip(layers, moments, strict=True)
    ]
    with torch.no_grad():
        for ids, mask in calibration:
            policy(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [moment.double() for moment in moments]


def most_important(scores: Sequence["torch.Tensor"], keep: int) -> list["torch.Tensor"]:
    """Return, for each layer, the places of its `keep` most important neurons, in their old order."""
    return [score.topk(keep).indices.sort().values for score in scores]


def hand_over(model: "PreTrainedModel", kept: Sequence["torch.Tensor"], moments: Sequence["torch.Tensor"]) -> None:
    """Change, in each layer, how the kept neurons are read, so that they stand in for the others as well as they can.

    There, the matrix W that reads the neurons x becomes the W' that minimizes the mean of |W x - W' x_kept|².
    """
    import torch

    for layer, stay, moment in zip(models.feed_forwards(model), kept, moments, strict=True):
        read = layer.down_proj.weight.detach()  # (H, F)
        ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(stay), dtype=moment.dtype, device=moment.device)
        solved = torch.linalg.solve(moment[stay][:, stay] + ridge, moment[stay] @ read.to(moment).T)  # (keep, H)
        read[:, stay] = solved.T.to(read)


def cut(model: "PreTrainedModel", kept: Sequence["torch.Tensor"]) -> "PreTrainedModel":
    """Remove the neurons that are not kept and return the smaller model."""
    import torch

    for mlp, stay in zip(models.feed_forwards(model), kept, strict=True):
        mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight.detach()[stay].clone())
        mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.detach()[stay].clone())
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:, stay].clone())
        keep = len(stay)
        mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = mlp.intermediate_size = keep
        model.config.intermediate_size = keep
    return model


def divergence(pruned: "PreTrainedModel", policy: "PreTrainedModel", batch: Sequence[Part], job: Job) -> "torch.Tensor":
    """Return the KL divergence (nats) of the pruned model's next-token distribution from the policy's, summed."""
    import torch

    total = torch.zeros((), device=policy.device)
    for ids, mask in batch:
        with models.autocast(policy, job.numerics):
            with torch.no_grad():
                target = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logits = pruned(input_ids=ids, attention_mask=mask, use_cache=False).logits
        asked = mask[:, 1:].bool()
        ours, theirs = (torch.log_softmax(part[:, :-1][asked].float(), -1) for part in (logits, target))
        total = total + torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return total


if __name__ == "__main__":
    stage.main("tasks.prune")
