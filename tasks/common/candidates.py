"""Models as the sheet sees them: one face for a torch model and for the INT8 files that will be served."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tasks.common import chat, models, sampling
from tasks.common.settings import Dtypes, Numerics

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Messages = Sequence[chat.Message]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Decoder(Protocol):
    """A causal model that replies and scores text; its size is its parameters and the bytes of its weights' file."""

    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...

    def reply(self, prompts: Sequence[Messages], max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        """Return a reply to each conversation; temperature 0 is greedy."""

    def negative_log_likelihood(self, rows: npt.NDArray[Any]) -> list[float]:
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
    return OnnxDecoder.load(path) if (path / "model.onnx").exists() else TorchDecoder.load(path, numerics)


def open_encoder(path: Path, numerics: Numerics) -> Encoder:
    """Open an encoder's folder: INT8 ONNX files where they are, else a Transformers model."""
    return OnnxEncoder.load(path) if (path / "model.onnx").exists() else TorchEncoder.load(path, numerics)


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
        return cls(model, chat.load_tokenizer(path), numerics, (path / "model.safetensors").stat().st_size)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return models.parameters(self.model)

    def reply(self, prompts: Sequence[Messages], max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        """Return a reply to each conversation; temperature 0 is greedy."""
        encoded = [chat.encode_prompt(self.tokenizer, messages) for messages in prompts]
        exact = self.numerics.model_copy(update={"dtype": Dtypes(decoder="float32", encoder="float32")})
        replies = sampling.replies(
            self.model,
            self.tokenizer,
            encoded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            numerics=exact,
        )
        return [sampling.decode(self.tokenizer, ids) for ids in replies]

    def negative_log_likelihood(self, rows: npt.NDArray[Any]) -> list[float]:
        """Return the summed negative log-likelihood (nats) of each row's tokens after its first; rows (N, T)."""
        import torch

        sums: list[float] = []
        with torch.no_grad():
            for ids in torch.from_numpy(rows.astype(np.int64)).to(self.model.device).split(32):
                sums += torch_nll(self.model(input_ids=ids).logits, ids)
        return sums


def torch_nll(logits: Any, ids: Any) -> list[float]:
    """Return the summed negative log-likelihood (nats) of each row from its logits (N, T, V) and ids (N, T)."""
    import torch

    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    sums: list[float] = loss.double().sum(1).tolist()
    return sums


@dataclass
class OnnxDecoder:
    """The INT8 decoder, run by the very engine that serves it."""

    path: Path
    parameters: int
    bytes: int

    @classmethod
    def load(cls, path: Path) -> "OnnxDecoder":
        """Read a folder that `quantize` left."""
        return cls(
            path, json.loads((path / "size.json").read_text())["parameters"], (path / "model.onnx").stat().st_size
        )

    def reply(self, prompts: Sequence[Messages], max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        """Return a reply to each conversation; temperature 0 is greedy."""
        from serving.engine import TextEngine

        engine = TextEngine(self.path)
        return [
            reply.text.strip()
            for reply in engine.generate_batch(
                prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
        ]

    def negative_log_likelihood(self, rows: npt.NDArray[Any]) -> list[float]:
        """Return the summed negative log-likelihood (nats) of each row's tokens after its first; rows (N, T)."""
        import torch

        session = _session(self.path)
        sums: list[float] = []
        for start in range(0, len(rows), 32):
            ids = rows[start : start + 32].astype(np.int64)
            logits = session.run(["logits"], _decoder_feed(session, ids))[0]
            sums += torch_nll(torch.from_numpy(logits), torch.from_numpy(ids))
        return sums


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])


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
        return cls(model, chat.load_tokenizer(path).backend_tokenizer, (path / "model.safetensors").stat().st_size)

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
    def load(cls, path: Path) -> "OnnxEncoder":
        """Read a folder that `quantize` left."""
        from tokenizers import Tokenizer

        size = json.loads((path / "size.json").read_text())["parameters"]
        return cls(
            _session(path),
            Tokenizer.from_file(str(path / "tokenizer.json")),
            size,
            (path / "model.onnx").stat().st_size,
        )

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """Return logits, shape (N, T, V), for token ids and attention mask, each (N, T)."""
        result: Floats = self.session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        return result
