"""From tokens to text: how an answer is drawn, how much of it fits, and how its text comes piece by piece."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from serving.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_STOPS = 4
MAX_TEMPERATURE = 2.0

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sampling:
    """How to draw an answer. Temperature 0, the default, always takes the likeliest token."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f'"max_new_tokens" must be 1 or more; got {self.max_new_tokens}.', field="max_new_tokens")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise InputError(
                f'"temperature" must be between 0 and {MAX_TEMPERATURE:g}; got {self.temperature:g}.',
                field="temperature",
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f'"top_p" must be above 0 and at most 1; got {self.top_p:g}.', field="top_p")
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise InputError(f'"stop" takes up to {MAX_STOPS} texts, none of them empty.', field="stop")

    def generator(self) -> np.random.Generator:
        """Return the random generator of one answer: the same seed draws the same answer again."""
        # OpenAI's clients may send any 64-bit integer, numpy takes none below zero.
        return np.random.default_rng(None if self.seed is None else self.seed % 2**64)

    def pick(self, logits: Floats, draw: np.random.Generator) -> int:
        """Draw one token: temperature first, then the smallest set of tokens whose probability reaches `top_p`.

        That is the order of OpenAI's API and of Transformers; onnxruntime-genai's own sampler cuts before it applies
        the temperature, which keeps many more tokens.
        """
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        weights = np.exp(scaled[order] - scaled[order[0]])
        sums = np.cumsum(weights)
        kept = min(int(np.searchsorted(sums, self.top_p * sums[-1])) + 1, len(sums))
        return int(draw.choice(order[:kept], p=weights[:kept] / sums[kept - 1]))


@dataclass(frozen=True)
class Limits:
    """How much fits, in tokens: `context` for prompt and answer together, `max_new_tokens` for the answer alone."""

    context: int
    max_new_tokens: int

    def room(self, prompt: int, asked: int | None) -> int:
        """Return how many tokens the answer to a prompt may have, or say what does not fit."""
        if prompt >= self.context:
            raise InputError(
                f"The input is too long: it has {prompt} tokens, chat markers included, and {self.context - 1} are "
                "allowed. Shorten it.",
                code="context_length_exceeded",
            )
        if asked is None:
            return min(self.max_new_tokens, self.context - prompt)
        if asked > self.max_new_tokens:
            raise InputError(
                f"{asked} new tokens were asked for and {self.max_new_tokens} are allowed.", field="max_new_tokens"
            )
        if prompt + asked > self.context:
            raise InputError(
                f"The input has {prompt} tokens and {asked} new ones were asked for, {prompt + asked} together; "
                f"{self.context} are allowed. Shorten the input or ask for at most {self.context - prompt}.",
                field="max_new_tokens",
                code="context_length_exceeded",
            )
        return asked


class Answer:
    """One answer as it comes: iterate over it once for pieces of text, then read what it was and how it ended."""

    def __init__(
        self, tokenizer: "Tokenizer", tokens: Iterator[int], room: int, prompt_tokens: int, stop: tuple[str, ...] = ()
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0  # the end marker is not counted
        self.text = ""
        self.finish_reason: Literal["stop", "length"] = "stop"
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._room = room
        self._stop = stop

    def __iter__(self) -> Iterator[str]:
        pending = ""  # decoded but held back, because a stop text may begin in it
        for piece in self._pieces():
            pending += piece
            cuts = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
            if cuts:
                pending = pending[: min(cuts)]
                self.finish_reason = "stop"
                break
            ready = len(pending) - _begun(pending, self._stop)
            if ready:
                yield self._emit(pending[:ready])
                pending = pending[ready:]
        if pending:
            yield self._emit(pending)

    def finish(self) -> Self:
        """Work the answer out to its end."""
        for _ in self:
            pass
        return self

    def _emit(self, piece: str) -> str:
        self.text += piece
        return piece

    def _pieces(self) -> Iterator[str]:
        """Yield whole characters: a token may end in the middle of one."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        ids: list[int] = []
        decoded = 0
        for token in self._tokens:
            ids.append(token)
            self.completion_tokens = len(ids)
            if piece := stream.step(self._tokenizer, token):
                decoded += len(piece)
                yield piece
        self.finish_reason = "length" if len(ids) >= self._room else "stop"
        # An answer cut in the middle of a character ends in the replacement character.
        if rest := self._tokenizer.decode(ids, skip_special_tokens=True)[decoded:]:
            yield rest


def _begun(text: str, stops: tuple[str, ...]) -> int:
    """Return how many characters at the end of a text could be the beginning of a stop text."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
