"""Make the policy smaller: remove its least important feed-forward neurons and let the rest recover.

Run as `python -m tasks.prune`. A neuron's importance is the expected squared effect on the loss of taking it away, to
first order (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8), or the norm of its
weights. Neurons are cut out of the matrices, so the model really is smaller. Recovery is distillation (Hinton et al.
2015): the pruned model learns the policy's own next-token distribution on the policy's replies and on statements.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tasks.common import chat, models, sampling, stage, tables
from tasks.common.settings import Settings
from tasks.common.shards import Mixture, Split
from tasks.common.stage import Job
from tasks.common.training import Losses, Optimizer, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {
    "model": "data/ppo/model",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {"model": "data/prune/model", "history": "data/prune/history.csv"}

Batch = tuple["torch.Tensor", "torch.Tensor"]  # token ids and attention mask, each (B, T)


class Config(Settings):
    """Settings of pruning."""

    importance: Literal["taylor", "magnitude"] = Field(description="How neurons are ranked")
    keep: float = Field(description="Share of the feed-forward neurons that stay", gt=0, le=1)
    calibration: int = Field(description="Batches that importance is measured on", ge=1)
    replies: int = Field(description="Replies of the policy that the pruned model learns from", ge=1)
    max_new_tokens: int = Field(description="Longest such reply, in tokens", ge=1)
    batch: int = Field(description="Replies a step", ge=1)
    windows: int = Field(description="Windows of pretraining text a step", ge=1)
    window: int = Field(description="Length of such a window, in tokens", ge=16)
    statements: float = Field(description="Share of the windows that is statements of facts", ge=0, le=1)
    steps: int = Field(description="Optimizer steps of the recovery", ge=0)
    optimizer: Optimizer


def run(config: Config, job: Job) -> dict[str, Any]:
    """Prune, recover and return sizes and the divergence from the policy before and after recovery."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
    policy = models.load_decoder(job.inputs["model"], job.numerics).eval()
    batches = Batches(config, job, policy, tokenizer)
    keep = max(1, round(config.keep * policy.config.intermediate_size))
    before = models.parameters(policy)
    pruned = cut(models.load_decoder(job.inputs["model"], job.numerics), importance(policy, config, batches.at), keep)

    def loss_at(step: int) -> tuple["torch.Tensor", Losses, int]:
        ids, mask = batches.at(step)
        return divergence(pruned, policy, ids, mask, job), {}, int(mask.sum())

    history = train(pruned, loss_at, config.optimizer, config.steps, job)
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


class Batches:
    """The policy's replies to training questions, and statements; a batch is a pure function of the step."""

    def __init__(
        self, config: Config, job: Job, policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"
    ) -> None:
        rows = tables.read(job.inputs["instructions"], "train").column("messages").to_pylist()
        unique = sorted({tuple(chat.encode_prompt(tokenizer, messages[:-1])) for messages in rows})
        chosen = np.random.default_rng([job.seed, 3]).choice(len(unique), config.replies)
        prompts = [list(unique[i]) for i in chosen]
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
        self.mixture = Mixture(split, config.window, config.windows, config.statements, job.seed)
        self.config, self.seed, self.pad = config, job.seed, tokenizer.pad_token_id

    def at(self, step: int) -> Batch:
        """Return a step's ids and mask: replies first, then windows of pretraining text."""
        import torch

        chosen = np.random.default_rng([self.seed, step, 4]).integers(len(self.rows), size=self.config.batch)
        windows = self.mixture.batch(step).tolist()
        rows: Sequence[list[int]] = [*(self.rows[i] for i in chosen), *windows]
        mask = chat.pad([[1] * len(row) for row in rows], 0)
        return torch.tensor(chat.pad(rows, self.pad)), torch.tensor(mask)


def importance(policy: "PreTrainedModel", config: Config, batch_at: Callable[[int], Batch]) -> list["torch.Tensor"]:
    """Return, for each layer, the importance of its feed-forward neurons, shape (feed_forward,)."""
    import torch

    layers = [layer.mlp for layer in policy.model.layers]
    if config.importance == "magnitude":
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
    for step in range(config.calibration):
        ids, mask = (tensor.to(policy.device) for tensor in batch_at(step))
        labels = ids.masked_fill(mask == 0, -100)
        loss = policy(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        for score, gradient in zip(scores, torch.autograd.grad(loss, gates), strict=True):
            score += gradient.square()
    for hook in hooks:
        hook.remove()
    return scores


def cut(model: "PreTrainedModel", scores: Sequence["torch.Tensor"], keep: int) -> "PreTrainedModel":
    """Keep the `keep` most important neurons of every layer, in their old order, and return the smaller model."""
    import torch

    for layer, score in zip(model.model.layers, scores, strict=True):
        stay = score.topk(keep).indices.sort().values
        mlp = layer.mlp
        mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight.detach()[stay].clone())
        mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.detach()[stay].clone())
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:, stay].clone())
        mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = mlp.intermediate_size = keep
    model.config.intermediate_size = keep
    return model


def divergence(
    pruned: "PreTrainedModel", policy: "PreTrainedModel", ids: "torch.Tensor", mask: "torch.Tensor", job: Job
) -> "torch.Tensor":
    """Return the mean KL divergence (nats a token) of the pruned model's next-token distribution from the policy's."""
    import torch

    ids, mask = ids.to(policy.device), mask.to(policy.device)
    with models.autocast(policy, job.numerics):
        with torch.no_grad():
            target = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = pruned(input_ids=ids, attention_mask=mask, use_cache=False).logits
    asked = mask[:, 1:].bool()
    ours, theirs = (torch.log_softmax(part[:, :-1][asked].float(), -1) for part in (logits, target))
    return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


if __name__ == "__main__":
    stage.main("tasks.prune")
