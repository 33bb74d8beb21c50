"""Models as the sheet sees them: one face for a torch model and for the INT8 files that will be served."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from serving import folders
from serving.errors import ServingError
from tasks.common.evaluation import sampling, surprise
from tasks.common.modelling import models
from tasks.common.settings import Dtypes, Numerics
from tasks.common.stage import StageError
from tasks.common.text import chat

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Prompt = Sequence[chat.Message] | str  # a conversation to reply to, or plain text to go on with
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
ROWS = 32  # of held-out prose at a time


class Decoder(Protocol):
    """A causal model that replies and scores text; its size is its parameters and the bytes of its weights' file.

    `desc` names the progress bar of what it does; none is shown without it.
    """

    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...

    def reply(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int, desc: str | None = None
    ) -> list[str]:
        """Return a reply to each conversation, and what follows each plain text; temperature 0 is greedy."""

    def negative_log_likelihood(self, rows: npt.NDArray[Any], desc: str | None = None) -> list[float]:
        """Return the summed negative log-likelihood (nats) of each row's tokens after its first; rows (N, T)."""


class Encoder(Protocol):
    """A masked model that scores tokens in place; its size is its parameters and the bytes of its weights' file."""

    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def tokenizer(self) -> "Tokenizer": ...

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """Return logits, shape (N, T, V), for token ids and attention mask, each (N, T)."""


def open_decoder(path: Path, numerics: Numerics) -> Decoder:
    """Open a decoder's folder: INT8 ONNX files where they are, else a Transformers model."""
    return OnnxDecoder.load(path, numerics) if (path / "model.onnx").exists() else TorchDecoder.load(path, numerics)


def open_encoder(path: Path, numerics: Numerics) -> Encoder:
    """Open an encoder's folder: INT8 ONNX files where they are, else a Transformers model."""
    return OnnxEncoder.load(path, numerics) if (path / "model.onnx").exists() else TorchEncoder.load(path, numerics)


@dataclass
class TorchDecoder:
    """A Transformers causal model, in float32 on the sheet whatever it was trained in."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    numerics: Numerics
    bytes: int

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "TorchDecoder":
        """Load model and tokenizer from a folder."""
        model = models.load_decoder(path, numerics).eval()
        return cls(model, chat.load_tokenizer(path), numerics, models.weight_bytes(path))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return models.parameters(self.model)

    def reply(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int, desc: str | None = None
    ) -> list[str]:
        """Return a reply to each conversation, and what follows each plain text; temperature 0 is greedy."""
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]
        exact = self.numerics.model_copy(update={"dtype": Dtypes(decoder="float32", encoder="float32")})
        replies = sampling.replies(
            self.model,
            self.tokenizer,
            encoded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            numerics=exact,
            desc=desc,
        )
        return [sampling.decode(self.tokenizer, ids) for ids in replies]

    def negative_log_likelihood(self, rows: npt.NDArray[Any], desc: str | None = None) -> list[float]:
        """Return the summed negative log-likelihood (nats) of each row's tokens after its first; rows (N, T)."""
        import torch

        sums: list[float] = []
        with torch.no_grad():
            for part in _parts(rows, desc):
                ids = torch.from_numpy(part).to(self.model.device)
                sums += surprise.row_nats(self.model(input_ids=ids).logits, ids)
        return sums


def encode(tokenizer: "PreTrainedTokenizerFast", prompt: Prompt) -> list[int]:
    """Return the ids that a model goes on from: of a conversation open for a reply, or of a text without its end."""
    if isinstance(prompt, str):
        return chat.encode_text(tokenizer, prompt)[:-1]
    return chat.encode_prompt(tokenizer, prompt)


def _parts(rows: npt.NDArray[Any], desc: str | None) -> Iterator[Ids]:
    """Yield rows (N, T) some at a time, under a progress bar."""
    from tqdm import tqdm

    for start in tqdm(range(0, len(rows), ROWS), desc=desc, disable=desc is None, mininterval=2):
        yield rows[start : start + ROWS].astype(np.int64)


@dataclass
class OnnxDecoder:
    """The INT8 decoder, run by the very engine that serves it, one question after another as the service does."""

    path: Path
    threads: int
    parameters: int
    bytes: int

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "OnnxDecoder":
        """Read a folder that `quantize` left."""
        size = json.loads((path / "size.json").read_text())["parameters"]
        return cls(path, numerics.threads, size, (path / "model.onnx").stat().st_size)

    def reply(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int, desc: str | None = None
    ) -> list[str]:
        """Return a reply to each conversation, and what follows each plain text; temperature 0 is greedy."""
        from tqdm import tqdm

        from serving.decoding import Sampling
        from serving.engine import TextEngine

        with _told(f"the INT8 model in {self.path} cannot be opened"):
            engine = TextEngine(self.path, self.threads)
        replies = []
        for at, prompt in enumerate(tqdm(prompts, desc=desc, disable=desc is None, mininterval=2)):
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            with _told(
                f"the INT8 model refuses the question {asked[:80]!r}",
                " Change evaluate.max_new_tokens or quantize.policy.max_new_tokens in params.yaml, or the row itself "
                "in its source.",
            ):
                drawn = Sampling(max_new_tokens, temperature, seed=seed * 1_000_003 + at)
                answer = engine.go_on(prompt, drawn) if isinstance(prompt, str) else engine.generate(prompt, drawn)
                replies.append(answer.text.strip())
        return replies

    def negative_log_likelihood(self, rows: npt.NDArray[Any], desc: str | None = None) -> list[float]:
        """Return the summed negative log-likelihood (nats) of each row's tokens after its first; rows (N, T)."""
        import torch

        session = _session(self.path, self.threads)
        sums: list[float] = []
        for ids in _parts(rows, desc):
            logits = session.run(["logits"], _decoder_feed(session, ids))[0]
            sums += surprise.row_nats(torch.from_numpy(logits), torch.from_numpy(ids))
        return sums


def _session(path: Path, threads: int) -> Any:
    with _told(f"the INT8 model in {path} cannot be opened"):
        return folders.load_onnx(path / "model.onnx", threads)


@contextmanager
def _told(what: str, remedy: str = "") -> Iterator[None]:
    """Let what the service would tell its reader be told as this stage's failure."""
    try:
        yield
    except ServingError as error:
        raise StageError(f"{what}: {error}{remedy}") from error


def _decoder_feed(session: Any, ids: Ids) -> dict[str, Any]:
    count, length = ids.shape
    feed: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for item in session.get_inputs():
        if item.name == "position_ids":
            feed[item.name] = np.tile(np.arange(length, dtype=np.int64), (count, 1))
        elif item.name.startswith("past_key_values"):
            feed[item.name] = np.zeros((count, item.shape[1], 0, item.shape[3]), np.float32)
    return feed


@dataclass
class TorchEncoder:
    """A Transformers masked model."""

    model: "PreTrainedModel"
    tokenizer: "Tokenizer"
    bytes: int

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "TorchEncoder":
        """Load model and tokenizer from a folder."""
        model = models.load_encoder(path, numerics).eval()
        return cls(model, chat.load_tokenizer(path).backend_tokenizer, models.weight_bytes(path))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return models.parameters(self.model)

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """Return logits, shape (N, T, V), for token ids and attention mask, each (N, T)."""
        import torch

        device = self.model.device
        with torch.no_grad():
            out = self.model(
                input_ids=torch.as_tensor(ids, device=device), attention_mask=torch.as_tensor(mask, device=device)
            )
        result: Floats = out.logits.float().cpu().numpy()
        return result


@dataclass
class OnnxEncoder:
    """The INT8 encoder under ONNX Runtime, as it is served."""

    session: Any
    tokenizer: "Tokenizer"
    parameters: int
    bytes: int

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "OnnxEncoder":
        """Read a folder that `quantize` left."""
        from tokenizers import Tokenizer

        size = json.loads((path / "size.json").read_text())["parameters"]
        return cls(
            _session(path, numerics.threads),
            Tokenizer.from_file(str(path / "tokenizer.json")),
            size,
            (path / "model.onnx").stat().st_size,
        )

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """Return logits, shape (N, T, V), for token ids and attention mask, each (N, T)."""
        result: Floats = self.session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        return result
