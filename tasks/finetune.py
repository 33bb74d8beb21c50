"""Fine-tune the pretrained decoder on conversations, with loss on the answers and the pretraining loss mixed in.

Run as `python -m tasks.finetune`. The loss is `task loss + w × pretraining loss`: without the second term the facts of
entities that no question mentions are lost (docs/decisions.md has the figures). Methods: `full`; `top` trains the last
blocks and the head; `lora` trains low-rank updates (Hu et al. 2021) through PEFT and merges them before saving.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tasks.common import chat, losses, models, stage, tables
from tasks.common.flops import Work
from tasks.common.settings import Settings
from tasks.common.shards import Mixture, Split
from tasks.common.stage import Job, StageError
from tasks.common.training import Drawn, Share, Training, batch_at, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {
    "model": "data/pretrain/clm/model",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {"model": "data/finetune/model", "history": "data/finetune/history.csv"}
PARALLEL = True


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


class Config(Training):
    """Settings of fine-tuning."""

    method: Annotated[Full | Top | Lora, Field(discriminator="name")]
    mix: Mix
    batch: int = Field(description="Conversations a step", ge=1)


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
    split, work = Split.open(job.inputs["shards"] / "train"), Work.of(trained, config.mix.window, job.numerics)
    trained, history = train(trained, Answers(config, job, trained, tokenizer, usable, split), config, job, work)
    models.save(merge(trained, config.method), tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return {
        "conversations": len(usable),
        "too_long": len(rows) - len(usable),
        "epochs": round(config.steps * config.batch / len(usable), 3),
        **summary(history),
    }


class Answers:
    """The answers of conversations, and pretraining text beside them."""

    steady = False

    def __init__(
        self, config: Config, job: Job, model: Any, tokenizer: "PreTrainedTokenizerFast", encoded: Sequence[Encoded],
        split: Split,
    ) -> None:  # fmt: skip
        mix = config.mix
        self.weights = {"task": 1.0, **({"pretraining": mix.weight} if mix.weight else {})}
        self.mixture = Mixture(split, mix.window, mix.batch, mix.statements, job.seed) if mix.weight else None
        self.config, self.job, self.model, self.encoded = config, job, model, encoded
        self.pad = tokenizer.pad_token_id

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's conversations, in groups of like length, and of its windows."""
        import torch

        batch = batch_at(list(enumerate(self.encoded)), self.config.batch, self.job.seed, step)[share.rows]
        rows = [encoded for _, encoded in batch]
        groups = [[rows[i] for i in group] for group in chat.alike([ids for ids, _ in rows])]
        windows = torch.empty(0, 0, dtype=torch.int64)
        if self.mixture is not None:
            windows = torch.from_numpy(self.mixture.batch(step)[share.rows])
        targets = {"task": sum(sum(answered) for _, answered in rows), "pretraining": windows[:, 1:].numel()}
        names = [f"conversation {number}" for number, _ in batch]
        return Drawn((groups, windows), targets, sum(len(ids) for ids, _ in rows) + windows.numel(), names)

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed surprise (nats) of the answers' tokens and of the windows'."""
        groups, windows = drawn.content
        device = next(self.model.parameters()).device
        found = {"task": self.answers(groups)}
        if self.mixture is not None:
            ids = windows.to(device)  # (B, T)
            with models.autocast(self.model, self.job.numerics):
                logits = self.model(input_ids=ids, use_cache=False).logits  # (B, T, V)
            found["pretraining"] = losses.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return found

    def answers(self, groups: Sequence[Sequence[Encoded]]) -> "torch.Tensor":
        """Return the summed cross-entropy (nats) over the answers' tokens."""
        import torch

        device = next(self.model.parameters()).device
        total = torch.zeros((), device=device)
        for group in groups:
            rows, answered = zip(*group, strict=True)
            ids, mask = chat.padded(rows, self.pad, device)  # (B, T)
            wanted = torch.tensor(chat.pad(answered, False), device=device)[:, 1:]  # (B, T - 1)
            with models.autocast(self.model, self.job.numerics):
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
            total = total + losses.cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted])
        return total


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


if __name__ == "__main__":
    stage.main("tasks.finetune")
