"""Answering as an objective: the answers of conversations, and pretraining text beside them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common.evaluation.surprise import windows_surprise
from tasks.common.modelling import models
from tasks.common.settings import Numerics, Settings
from tasks.common.stage import Job
from tasks.common.text.conversations import Named
from tasks.common.text.packing import Encoded, Rows, packed_rows, padded_rows
from tasks.common.text.shards import Mixture, Split, Weights
from tasks.common.training import losses
from tasks.common.training.loop import Drawn, Share, batch_at

if TYPE_CHECKING:
    import torch


class Chat(Settings):
    """The decoder learns to answer."""

    name: Literal["chat"] = Field(description="Task")
    answers: Literal["all", "last"] = Field(description="Answers of a conversation that are learnt")
    packing: int | None = Field(
        description="Tokens of a row that several conversations share; null gives each a row of its own", ge=16
    )


class Mix(Settings):
    """Pretraining text that is trained on beside the conversations."""

    weight: float = Field(description="w in `answer loss + w x pretraining loss`; 0 leaves it out", ge=0)
    batch: int = Field(description="Windows a step", ge=1)
    window: int = Field(description="Length of a window, in tokens", ge=16)
    mixture: Weights


class Answers:
    """The answers of conversations, and windows of pretraining text beside them where they have a weight."""

    steady = False

    def __init__(
        self, model: Any, conversations: Sequence[Named], batch: int, task: Chat, mix: Mix, fill: int, job: Job
    ) -> None:
        self.weights = {"task": 1.0, **({"pretraining": mix.weight} if mix.weight else {})}
        self.mixture = None
        if mix.weight:
            split = Split.open(job.inputs["shards"] / "train")
            self.mixture = Mixture(split, mix.window, mix.batch, mix.mixture, job.seed)
        self.model, self.conversations, self.batch, self.fill, self.job = model, conversations, batch, fill, job
        self.packing = task.packing

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's conversations, as rows of forward passes, and of its windows."""
        part = batch_at(self.conversations, self.batch, self.job.seed, step)[share.rows]
        encoded = [item for _, item in part]
        targets = {"task": sum(sum(answered) for _, answered in encoded)}
        tokens = sum(len(ids) for ids, _ in encoded)
        windows = None
        if self.mixture is not None:
            windows = _share_of(self.mixture, step, share)
            ids, asked = windows
            targets["pretraining"] = ids[:, 1:].numel() if asked else 0
            tokens += ids.numel() if asked else 0
        return Drawn((self._rows(encoded), windows), targets, tokens, [f"conversation {name}" for name, _ in part])

    def _rows(self, encoded: Sequence[Encoded]) -> list[Rows]:
        if self.packing is None:
            return list(padded_rows(encoded, self.fill))
        return list(packed_rows(encoded, self.packing, self.fill, in_one=self.job.numerics.parallel.in_step))

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed surprise (nats) of the answers' tokens and of the windows'."""
        rows, windows = drawn.content
        found = {"task": answers_surprise(self.model, rows, self.job.numerics)}
        if windows is not None:
            ids, asked = windows
            found["pretraining"] = windows_surprise(self.model, ids, self.job.numerics) * float(asked)
        return found


def _share_of(mixture: Mixture, step: int, share: Share) -> "tuple[torch.Tensor, bool]":
    """Return the ids of a part's windows (B, T) of a step and whether anything is asked of them.

    Where there are more parts than windows a part passes one through the model, of which nothing is asked: where
    weights are shared out among processes, the others wait for its pass.
    """
    import torch

    ids = mixture.batch(step, share.rows)
    return torch.from_numpy(ids if len(ids) else mixture.batch(step, slice(1))), len(ids) > 0


def answers_surprise(model: Any, passes: Iterable[Rows], numerics: Numerics) -> "torch.Tensor":
    """Return the summed cross-entropy (nats) over the tokens of answers."""
    import torch

    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for rows in (rows.on(device) for rows in passes):
        wanted = rows.asked[:, 1:]  # (B, T - 1)
        with models.autocast(model, numerics):
            logits = model(**rows.inputs, use_cache=False).logits  # (B, T, V)
        total = total + losses.cross_entropy(logits[:, :-1][wanted], rows.inputs["input_ids"][:, 1:][wanted])
    return total


def mean_surprise(model: Any, encoded: Sequence[Encoded], fill: int, numerics: Numerics) -> float | None:
    """Return the mean cross-entropy over the answers' tokens of conversations (nats); None without any."""
    import torch

    asked = sum(sum(answered) for _, answered in encoded)
    if not asked:
        return None
    model.eval()
    with torch.no_grad():
        total = answers_surprise(model, padded_rows(encoded, fill), numerics)
    return round(total.item() / asked, 6)
