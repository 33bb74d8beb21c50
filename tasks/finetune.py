"""Fine-tune the pretrained decoder on conversations, with loss on the answers and the pretraining loss mixed in.

Run as `python -m tasks.finetune`. The loss is `task loss + w × pretraining loss`: without the second term the facts of
entities that no question mentions are lost (docs/decisions.md has the figures). Methods: `full`; `top` trains the last
blocks and the head; `lora` trains low-rank updates (Hu et al. 2021) through PEFT and merges them before saving.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tasks.common import chat, models, stage, tables
from tasks.common.settings import Settings
from tasks.common.shards import Mixture, Split
from tasks.common.stage import Job, StageError
from tasks.common.training import Losses, Optimizer, batch_at, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {
    "model": "data/pretrain/clm/model",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {"model": "data/finetune/model", "history": "data/finetune/history.csv"}


class Full(Settings):
    """Every weight is trained."""

    name: Literal["full"] = Field(description="Method")


class Top(Settings):
    """Only the last blocks, the final norm and the (tied) head are trained."""

    name: Literal["top"] = Field(description="Method")
    layers: int = Field(description="Blocks to train, counted from the top", ge=1)


class Lora(Settings):
    """Low-rank updates of every linear layer are trained, through PEFT."""

    name: Literal["lora"] = Field(description="Method")
    rank: int = Field(description="Rank of an update", ge=1)
    alpha: int = Field(description="Scale of an update, divided by its rank", ge=1)


class Mix(Settings):
    """Pretraining text that is trained on beside the conversations."""

    weight: float = Field(description="w in `task loss + w x pretraining loss`; 0 leaves it out", ge=0)
    batch: int = Field(description="Windows a step", ge=1)
    window: int = Field(description="Length of a window, in tokens", ge=16)
    statements: float = Field(description="Share of the windows that is statements of facts", ge=0, le=1)


class Config(Settings):
    """Settings of fine-tuning."""

    method: Annotated[Full | Top | Lora, Field(discriminator="name")]
    mix: Mix
    batch: int = Field(description="Conversations a step", ge=1)
    steps: int = Field(description="Optimizer steps", ge=1)
    optimizer: Optimizer


Encoded = tuple[list[int], list[bool]]


def run(config: Config, job: Job) -> dict[str, Any]:
    """Tune the decoder and return its losses and how many conversations were used or too long."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
    model = models.load_decoder(job.inputs["model"], job.numerics)
    rows = tables.read(job.inputs["instructions"], "train").to_pylist()
    encoded = [chat.encode_chat(tokenizer, row["messages"]) for row in rows]
    usable = [item for item in encoded if len(item[0]) <= tokenizer.model_max_length]
    if not usable:
        raise StageError(
            f"none of the {len(rows)} conversations fits into {tokenizer.model_max_length} tokens; "
            "raise tokenize.context."
        )
    trained = apply_method(model, config.method)
    mix, split = config.mix, Split.open(job.inputs["shards"] / "train")
    mixture = Mixture(split, mix.window, mix.batch, mix.statements, job.seed) if mix.weight else None

    def loss_at(step: int) -> tuple["torch.Tensor", Losses, int]:
        task, read = answer_loss(trained, tokenizer, batch_at(usable, config.batch, job.seed, step), job)
        if mixture is None:
            return task, {"task_loss": task}, read
        pretraining, more = window_loss(trained, mixture, step, job)
        return task + mix.weight * pretraining, {"task_loss": task, "pretraining_loss": pretraining}, read + more

    history = train(trained, loss_at, config.optimizer, config.steps, job)
    models.save(merge(trained, config.method), tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return {
        "conversations": len(usable),
        "too_long": len(rows) - len(usable),
        "epochs": round(config.steps * config.batch / len(usable), 3),
        **summary(history),
    }


def apply_method(model: "PreTrainedModel", method: Full | Top | Lora) -> "torch.nn.Module":
    """Return the model to train, with everything frozen that the method leaves alone."""
    if isinstance(method, Top):
        layers = model.model.layers
        if method.layers > len(layers):
            raise StageError(f"finetune.method.layers is {method.layers}, but the model has {len(layers)} blocks.")
        model.requires_grad_(False)
        for part in (*layers[-method.layers :], model.model.norm, model.get_output_embeddings()):
            part.requires_grad_(True)
    if isinstance(method, Lora):
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=method.rank, lora_alpha=method.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(model, settings)
    return model


def merge(model: Any, method: Full | Top | Lora) -> "PreTrainedModel":
    """Return a plain Transformers model: low-rank updates are added to the weights that they belong to."""
    plain: PreTrainedModel = model.merge_and_unload() if isinstance(method, Lora) else model
    return plain


def answer_loss(
    model: Any, tokenizer: "PreTrainedTokenizerFast", batch: Sequence[Encoded], job: Job
) -> tuple["torch.Tensor", int]:
    """Return the mean cross-entropy over the answers' tokens (nats) and the number of tokens read."""
    import torch

    device = next(model.parameters()).device
    total, asked, read = torch.zeros((), device=device), 0, 0
    for group in chat.alike([ids for ids, _ in batch]):
        rows, answered = zip(*(batch[i] for i in group), strict=True)
        ids, mask = chat.padded(rows, tokenizer.pad_token_id, device)  # (B, T)
        wanted = torch.tensor(chat.pad(answered, False), device=device)[:, 1:]  # (B, T - 1)
        with models.autocast(model, job.numerics):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
        total = total + torch.nn.functional.cross_entropy(
            logits[:, :-1][wanted].float(), ids[:, 1:][wanted], reduction="sum"
        )
        asked += int(wanted.sum())
        read += sum(map(len, rows))
    return total / asked, read


def window_loss(model: Any, mixture: Mixture, step: int, job: Job) -> tuple["torch.Tensor", int]:
    """Return the causal pretraining loss (nats a token) on a step's windows and the number of tokens read."""
    import torch

    ids = torch.from_numpy(mixture.batch(step)).to(next(model.parameters()).device)  # (B, T)
    with models.autocast(model, job.numerics):
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()), ids.numel()


if __name__ == "__main__":
    stage.main("tasks.finetune")
