"""The chat objective: cross-entropy on the answers of conversations, plus a weighted pretraining loss."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common.evaluation.nll import windows_nll
from tasks.common.harness.job import Job
from tasks.common.modelling import models
from tasks.common.settings import Numerics, Settings
from tasks.common.text.mixtures import Mixture, Weights
from tasks.common.text.shards import Split
from tasks.common.training import losses
from tasks.common.training.loop import MicroBatch, Shard, batch_at
from tasks.finetune.conversations import EncodedConversation
from tasks.finetune.packing import Encoded, Rows, packed_rows, padded_rows

if TYPE_CHECKING:
    import torch


class Chat(Settings):
    """Chat: the decoder learns to answer."""

    name: Literal["chat"] = Field(description="Task")
    answers: Literal["all", "last"] = Field(default="all", description="Answers of a conversation that the loss covers")
    packing: int | None = Field(
        default=None,
        description="Length of a packed row in tokens; null: one conversation per row",
        ge=16,
    )


class PretrainingMix(Settings):
    """Pretraining text mixed into fine-tuning."""

    weight: float = Field(default=0.0, description="w in `answer loss + w x pretraining loss`; 0 disables it", ge=0)
    batch: int = Field(default=16, description="Windows per step", ge=1)
    window: int = Field(default=64, description="Length of a window (tokens)", ge=16)
    mixture: Weights = Field(default={"prose": 1.0})


class ChatObjective:
    """Answers of conversations, and windows of pretraining text if `mix.weight` is above 0."""

    static_shapes = False

    def __init__(
        self,
        model: Any,
        conversations: Sequence[EncodedConversation],
        batch: int,
        task: Chat,
        mix: PretrainingMix,
        pad_id: int,
        job: Job,
    ) -> None:
        self.weights = {"task": 1.0, **({"pretraining": mix.weight} if mix.weight else {})}
        self.mixture = None
        if mix.weight:
            split = Split.open(job.inputs["shards"] / "train")
            self.mixture = Mixture(split, mix.window, mix.batch, mix.mixture, job.seed)
        self.model, self.conversations, self.batch, self.pad_id, self.job = model, conversations, batch, pad_id, job
        self.packing = task.packing

    def draw(self, step: int, shard: Shard) -> MicroBatch:
        """Return a shard of a step's conversations, as rows of forward passes, and of its windows."""
        part = batch_at(self.conversations, self.batch, self.job.seed, step)[shard.rows]
        encoded = [item for _, item in part]
        targets = {"task": sum(sum(answered) for _, answered in encoded)}
        tokens = sum(len(ids) for ids, _ in encoded)
        windows = None
        if self.mixture is not None:
            windows = _read_windows(self.mixture, step, shard)
            ids, counted = windows
            targets["pretraining"] = ids[:, 1:].numel() if counted else 0
            tokens += ids.numel() if counted else 0
        return MicroBatch((self._rows(encoded), windows), targets, tokens, [f"conversation {name}" for name, _ in part])

    def _rows(self, encoded: Sequence[Encoded]) -> list[Rows]:
        if self.packing is None:
            return list(padded_rows(encoded, self.pad_id))
        return list(packed_rows(encoded, self.packing, self.pad_id, single_pass=self.job.numerics.parallel.lockstep))

    def loss_sums(self, micro_batch: MicroBatch) -> dict[str, "torch.Tensor"]:
        """Return the summed negative log-likelihoods (nats) of the answer tokens and of the windows."""
        rows, windows = micro_batch.inputs
        sums = {"task": answers_nll(self.model, rows, self.job.numerics)}
        if windows is not None:
            ids, counted = windows
            sums["pretraining"] = windows_nll(self.model, ids, self.job.numerics) * float(counted)
        return sums


def _read_windows(mixture: Mixture, step: int, shard: Shard) -> "tuple[torch.Tensor, bool]":
    """Return the ids (B, T) of a shard's windows of a step, and whether they count in the loss.

    A shard without windows of its own passes one window that does not count through the model, because with sharded
    weights the other processes wait for its forward pass.
    """
    import torch

    ids = mixture.batch(step, shard.rows)
    return torch.from_numpy(ids if len(ids) else mixture.batch(step, slice(1))), len(ids) > 0


def answers_nll(model: Any, passes: Iterable[Rows], numerics: Numerics) -> "torch.Tensor":
    """Return the summed cross-entropy (nats) over answer tokens."""
    import torch

    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for rows in (rows.to(device) for rows in passes):
        targets = rows.loss_mask[:, 1:]  # (B, T - 1)
        with models.autocast(model, numerics):
            logits = model(**rows.inputs, use_cache=False).logits  # (B, T, V)
        total = total + losses.cross_entropy(logits[:, :-1][targets], rows.inputs["input_ids"][:, 1:][targets])
    return total


def mean_nll(
    model: Any, encoded: Sequence[Encoded], pad_id: int, numerics: Numerics, desc: str | None = None
) -> float | None:
    """Return the mean cross-entropy (nats per token) over the answer tokens of conversations; None without any.

    `desc` is the title of the progress bar; without it none is shown.
    """
    import torch
    from tqdm import tqdm

    token_count = sum(sum(answered) for _, answered in encoded)
    if not token_count:
        return None
    model.eval()
    passes = list(padded_rows(encoded, pad_id))
    with torch.no_grad():
        total = answers_nll(model, tqdm(passes, desc=desc, disable=desc is None, mininterval=2), numerics)
    return round(total.item() / token_count, 6)
