"""Causal models under test: one interface for a torch model and for the INT8 files that will be served."""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from serving import folders
from serving.errors import ServingError
from tasks.common.evaluation import nll
from tasks.common.generation import sampling
from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.random_streams import Stream, derive_seed
from tasks.common.settings import Dtypes, Numerics
from tasks.common.text import chat
from tasks.evaluate import token_scores
from tasks.evaluate.token_scores import TokenScores
from tasks.evaluate.transformers_folder import TransformersFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from serving.engine import TextEngine

Prompt = Sequence[chat.Message] | str  # a conversation to reply to, or plain text to continue
Ids = npt.NDArray[np.int64]
TEXT_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # of a template, that a tokenizer has
BATCH_ROWS = 32  # rows of held-out text in one forward pass


class Decoder(Protocol):
    """A causal model that generates replies and scores text.

    `parameters` counts its parameters, `bytes` is the size of its weights file. `desc` is the title of the progress
    bar; without it none is shown.
    """

    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...

    @property
    def context(self) -> int:
        """The longest prompt and reply together, in tokens."""

    @property
    def longest_reply(self) -> int:
        """The longest reply, in tokens."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """The special tokens, which a text must not contain."""

    def max_reply_tokens(self, prompt: Prompt) -> int | None:
        """Return how many tokens a reply may have; None if the model has no chat template for a conversation."""

    def reply(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int, desc: str | None = None
    ) -> list[str]:
        """Return a reply to each conversation and a continuation of each plain text; temperature 0 is greedy."""

    def negative_log_likelihood(self, rows: npt.NDArray[Any], desc: str | None = None) -> list[float]:
        """Return the summed negative log-likelihood (nats) of each row's tokens after its first; rows (N, T)."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer with its chat template."""

    def token_scores(
        self, rows: Sequence[Sequence[int]], firsts: Sequence[int], desc: str | None = None
    ) -> list[TokenScores]:
        """Return how the model predicts each row's tokens from position `first` (≥ 1) on, given those before them."""


def have_same_vocabulary(path: Path, other: Path) -> bool:
    """Whether two folders hold tokenizers with the same vocabulary."""
    from tokenizers import Tokenizer

    files = [folder / "tokenizer.json" for folder in (path, other)]
    if not all(file.is_file() for file in files):
        return False
    vocabulary, other_vocabulary = (Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True) for file in files)
    return bool(vocabulary == other_vocabulary)


def open_decoder(path: Path, numerics: Numerics, template: str | None = None) -> Decoder:
    """Open a decoder folder: an export of `quantize` with the serving engine, else a Transformers model.

    `template` names the chat template of a Transformers model (`templates.choose`); an export has its own.
    """
    if (path / folders.GRAPH_FILE).exists():
        return EngineDecoder.load(path, numerics)
    return TorchDecoder.load(path, numerics, template)


class TorchDecoder(TransformersFolder):
    """A Transformers causal model, run in float32 regardless of the dtype it was trained in."""

    @classmethod
    def load(cls, path: Path, numerics: Numerics, template: str | None = None) -> "TorchDecoder":
        """Load model and tokenizer from a folder."""
        model = models.load_decoder(path, numerics).eval()
        return cls(model, chat.load_tokenizer(path, template), numerics, models.weight_bytes(path))

    @property
    def longest_reply(self) -> int:
        """The longest reply, in tokens: only the context limits it."""
        return self.context

    def max_reply_tokens(self, prompt: Prompt) -> int | None:
        """Return how many tokens a reply may have; None for a conversation if the model has no chat template."""
        if not isinstance(prompt, str) and self.tokenizer.chat_template is None:
            return None
        with models.suppress_warnings("transformers"):  # it warns about the first text that is too long
            return int(self.tokenizer.model_max_length) - len(encode(self.tokenizer, prompt))

    def reply(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int, desc: str | None = None
    ) -> list[str]:
        """Return a reply to each conversation and a continuation of each plain text; temperature 0 is greedy."""
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]
        float32_numerics = self.numerics.model_copy(update={"dtype": Dtypes(decoder="float32", encoder="float32")})
        replies = sampling.generate_replies(
            self.model,
            self.tokenizer,
            encoded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            numerics=float32_numerics,
            desc=desc,
        )
        return [sampling.decode_reply(self.tokenizer, ids) for ids in replies]

    def negative_log_likelihood(self, rows: npt.NDArray[Any], desc: str | None = None) -> list[float]:
        """Return the summed negative log-likelihood (nats) of each row's tokens after its first; rows (N, T)."""
        import torch

        sums: list[float] = []
        with torch.no_grad():
            for part in _batches(rows, desc):
                ids = torch.from_numpy(part).to(self.model.device)
                sums += nll.row_nll(self.model(input_ids=ids).logits, ids)
        return sums

    def token_scores(
        self, rows: Sequence[Sequence[int]], firsts: Sequence[int], desc: str | None = None
    ) -> list[TokenScores]:
        """Return how the model predicts each row's tokens from position `first` (≥ 1) on, given those before them.

        Rows of equal length share a forward pass, so no padding can have an effect.
        """
        return token_scores.of_torch(self.model, rows, firsts, desc)


def encode(tokenizer: "PreTrainedTokenizerFast", prompt: Prompt) -> list[int]:
    """Return the input ids: a conversation with the generation prompt, or a text without its end-of-text token."""
    if isinstance(prompt, str):
        return chat.encode_text(tokenizer, prompt)[:-1]
    return chat.encode_prompt(tokenizer, prompt)


def _batches(rows: npt.NDArray[Any], desc: str | None) -> Iterator[Ids]:
    """Yield rows (N, T) in batches of BATCH_ROWS, with a progress bar."""
    from tqdm import tqdm

    for start in tqdm(range(0, len(rows), BATCH_ROWS), desc=desc, disable=desc is None, mininterval=2):
        yield rows[start : start + BATCH_ROWS].astype(np.int64)


@dataclass
class EngineDecoder:
    """The INT8 decoder, run by the serving engine, with prompts batched as the service does."""

    path: Path
    threads: int
    parameters: int
    bytes: int

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "EngineDecoder":
        """Open an export of `quantize`."""
        return cls(path, numerics.threads, *read_size(path))

    @cached_property
    def engine(self) -> "TextEngine":
        """The serving engine of this folder."""
        from serving.engine import TextEngine

        with as_stage_error(f"the INT8 model in {self.path} cannot be opened"):
            return TextEngine(self.path, self.threads)

    @property
    def context(self) -> int:
        """The longest prompt and reply together, in tokens."""
        return self.engine.limits.context

    @property
    def longest_reply(self) -> int:
        """The longest reply, in tokens, which the export limits."""
        return self.engine.limits.max_new_tokens

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens, which a text must not contain."""
        return [token.content for token in self.engine.tokenizer.get_added_tokens_decoder().values() if token.special]

    def max_reply_tokens(self, prompt: Prompt) -> int | None:
        """Return how many tokens a reply may have; None for a conversation if the model has no chat template."""
        if not isinstance(prompt, str) and self.engine.template is None:
            return None
        if isinstance(prompt, str):
            prompt_tokens = 1 + len(self.engine.tokenizer.encode(prompt, add_special_tokens=False).ids)
        else:
            with _as_rejected_prompt(prompt):
                prompt_tokens = len(self.engine.encode(prompt))
        return self.engine.limits.context - prompt_tokens

    def reply(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int, desc: str | None = None
    ) -> list[str]:
        """Return a reply to each conversation and a continuation of each plain text; temperature 0 is greedy."""
        from tqdm import tqdm

        from serving.decoding import Sampling

        engine, requests = self.engine, []
        for index, prompt in enumerate(prompts):
            with _as_rejected_prompt(prompt):
                settings = Sampling(max_new_tokens, temperature, seed=derive_seed(seed, Stream.REPLY, index))
                requests.append(engine.prepare(prompt, settings))
        with as_stage_error(f"the INT8 model in {self.path} does not answer"):
            answers = engine.start_all(requests)
            progress = tqdm(answers, desc=desc, disable=desc is None, mininterval=2)
            return [answer.finish().text.strip() for answer in progress]

    def negative_log_likelihood(self, rows: npt.NDArray[Any], desc: str | None = None) -> list[float]:
        """Return the summed negative log-likelihood (nats) of each row's tokens after its first; rows (N, T)."""
        import torch

        from serving.engine import DecoderLogits

        sums: list[float] = []
        with as_stage_error(f"the INT8 model in {self.path} cannot be opened"):
            logits = DecoderLogits(self.path, self.threads)
        for ids in _batches(rows, desc):
            sums += nll.row_nll(torch.from_numpy(logits(ids)), torch.from_numpy(ids))
        return sums

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer of the export as Transformers has it, with the chat template and the control tokens."""
        from transformers import PreTrainedTokenizerFast

        template = self.engine.template
        tokens = {name: token for name, token in (template.tokens if template else {}).items() if name in TEXT_TOKENS}
        end = self.engine.tokenizer.id_to_token(self.engine.eos_ids[0])
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
            tokenizer_file=str(self.path / "tokenizer.json"), model_max_length=self.context,
            chat_template=template and template.source, **{"eos_token": end, **tokens},
        )  # fmt: skip
        return tokenizer

    def token_scores(
        self, rows: Sequence[Sequence[int]], firsts: Sequence[int], desc: str | None = None
    ) -> list[TokenScores]:
        """Return how the model predicts each row's tokens from position `first` (≥ 1) on, given those before them.

        Rows run one at a time: with INT8 the scores of a row depend on the other rows of its batch.
        """
        from serving.engine import DecoderLogits

        with as_stage_error(f"the INT8 model in {self.path} cannot be opened"):
            logits = DecoderLogits(self.path, self.threads)
        return token_scores.of_engine(logits, rows, firsts, desc)


def read_size(path: Path) -> tuple[int, int]:
    """Return the number of parameters of an export of `quantize` and the size of its weights file in bytes."""
    parameters: int = json.loads((path / "size.json").read_text())["parameters"]
    return parameters, (path / folders.WEIGHTS_FILE).stat().st_size


@contextmanager
def as_stage_error(what: str, remedy: str = "") -> Iterator[None]:
    """Re-raise an error of the serving engine as StageError."""
    try:
        yield
    except ServingError as error:
        raise StageError(f"{what}: {error}{remedy}") from error


def _as_rejected_prompt(prompt: Prompt) -> AbstractContextManager[None]:
    """Re-raise the serving engine's rejection of a prompt as StageError that names the prompt and the remedy."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    remedy = (
        " Change max_new_tokens of the evaluation or of the export in params.yaml, or the row itself in its source."
    )
    return as_stage_error(f"the INT8 model rejects the question {text[:80]!r}", remedy)
