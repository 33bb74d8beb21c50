"""Sampling settings, length limits, and the incremental decoding of generated tokens to text."""

import re
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self

from serving.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_STOPS = 4
MAX_TEMPERATURE = 2.0
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # invalid UTF-8 decodes to it


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Temperature 0, the default, is greedy decoding."""

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
            raise InputError(f'"stop" takes up to {MAX_STOPS} non-empty texts.', field="stop")

    def resolve_seed(self) -> int:
        """Return the engine's seed in [0, 2**32): derived from `seed`, or random if it is None.

        OpenAI's clients may send any 64-bit integer; the engine uses only the lower 32 bits, so both halves are mixed.
        """
        if self.seed is None:
            return secrets.randbelow(2**32)
        whole = self.seed % 2**64
        return (whole ^ whole >> 32) % 2**32


@dataclass(frozen=True)
class Limits:
    """Length limits in tokens: `context` for prompt and answer together, `max_new_tokens` for the answer."""

    context: int
    max_new_tokens: int

    def allowed_new_tokens(self, prompt: int, requested: int | None) -> int:
        """Return the maximum number of new tokens after `prompt` tokens; raise InputError if they do not fit."""
        if prompt >= self.context:
            raise InputError(
                f"The input is too long: it has {prompt} tokens, chat markers included, and {self.context - 1} are "
                "allowed. Shorten it.",
                code="context_length_exceeded",
            )
        if requested is None:
            return min(self.max_new_tokens, self.context - prompt)
        if requested > self.max_new_tokens:
            raise InputError(
                f"{requested} new tokens were requested and {self.max_new_tokens} are allowed.", field="max_new_tokens"
            )
        if prompt + requested > self.context:
            raise InputError(
                f"The input has {prompt} tokens and {requested} new ones were requested, {prompt + requested} in all; "
                f"{self.context} are allowed. Shorten the input or request at most {self.context - prompt}.",
                field="max_new_tokens",
                code="context_length_exceeded",
            )
        return requested


class TokenSource(Protocol):
    """Source of an answer's tokens; implemented by `serving.batching.Request`."""

    def take(self, *, whole: bool = False) -> list[int]:
        """Wait for new tokens and return them; an empty list is the end. `whole`: wait for the end, return all."""

    async def take_async(self, *, whole: bool = False) -> list[int]:
        """Like `take`, without blocking the event loop."""

    def cancel(self) -> None:
        """Stop generating."""


class Answer:
    """One streamed answer: iterate over it once for pieces of text, then read `text` and `finish_reason`.

    Leaving the iteration or dropping the object cancels its request.
    """

    def __init__(
        self, tokenizer: "Tokenizer", source: TokenSource, max_tokens: int, prompt_tokens: int,
        stop: tuple[str, ...] = (), eos_ids: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0  # without the end token
        self.text = ""
        self.finish_reason: Literal["stop", "length"] = "stop"
        self._tokenizer = tokenizer
        self._source = source
        self._max_tokens = max_tokens
        self._eos_ids = eos_ids
        self._stop = stop
        self._stopped = False  # at a stop sequence
        self._pieces = IncrementalDecoder(tokenizer)
        self._pending = ""  # decoded but held back, because a stop sequence may start in it

    def __iter__(self) -> Iterator[str]:
        try:
            while not self._stopped and (tokens := self._source.take()):
                yield from self._consume(tokens)
            yield from self._close()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            while not self._stopped and (tokens := await self._source.take_async()):
                for piece in self._consume(tokens):
                    yield piece
            for piece in self._close():
                yield piece
        finally:
            self.cancel()

    def finish(self) -> Self:
        """Generate the whole answer."""
        if self._stop:  # a stop sequence may end the answer at any piece
            for _ in self:
                pass
        else:
            self._set_tokens(self._source.take(whole=True))
        return self

    async def finish_async(self) -> Self:
        """Like `finish`, without blocking the event loop."""
        if self._stop:
            async for _ in self:
                pass
        else:
            self._set_tokens(await self._source.take_async(whole=True))
        return self

    def cancel(self) -> None:
        """Cancel the generation."""
        self._source.cancel()

    def __del__(self) -> None:
        self.cancel()

    def _set_tokens(self, tokens: list[int]) -> None:
        """Set the answer from all of its tokens at once, which is much faster than token by token."""
        ids = [token for token in tokens if token not in self._eos_ids]
        self.completion_tokens = len(ids)
        self.text = self._tokenizer.decode(ids, skip_special_tokens=True)
        self.finish_reason = "length" if len(ids) >= self._max_tokens else "stop"

    def _consume(self, tokens: list[int]) -> Iterator[str]:
        """Add tokens and yield the text that is complete, up to a stop sequence."""
        for token in tokens:
            if self._stopped or token in self._eos_ids:
                return
            self.completion_tokens += 1
            self._pending += self._pieces.add(token)
            cuts = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
            if cuts:
                self._pending, self._stopped = self._pending[: min(cuts)], True
            elif ready := len(self._pending) - _partial_stop_length(self._pending, self._stop):
                yield self._emit(ready)

    def _close(self) -> Iterator[str]:
        if not self._stopped:
            self._pending += self._pieces.close()
            self.finish_reason = "length" if self.completion_tokens >= self._max_tokens else "stop"
        if self._pending:
            yield self._emit(len(self._pending))

    def _emit(self, length: int) -> str:
        piece, self._pending = self._pending[:length], self._pending[length:]
        self.text += piece
        return piece


class IncrementalDecoder:
    """Incremental detokenization into whole characters: a token may end in the middle of a UTF-8 character.

    `tokenizers.decoders.DecodeStream` is not used because it fails on invalid UTF-8. Here such bytes become replacement
    characters.
    """

    MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has up to 4 bytes, each of which may be a token
    # Byte-fallback tokenizers (Llama 2) decode a run of byte tokens as a whole: one invalid byte makes all of them
    # replacement characters. A run is held back until it ends, or has this many tokens and ends a character.
    MAX_RUN_TOKENS = 64

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._run = 0  # byte tokens at the end
        self._start = self._read = 0  # token offsets: start of the decoded window, end of the emitted tokens

    def add(self, token: int) -> str:
        """Return the text that a token adds; an incomplete character is held back."""
        self._ids.append(token)
        self._run = self._run + 1 if BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or "") else 0
        if 0 < self._run < self.MAX_RUN_TOKENS:
            return ""
        text = self._text(self._start, len(self._ids))
        held = self.MAX_CHARACTER_TOKENS + (self.MAX_RUN_TOKENS if self._run else 0)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < held:
            return ""
        self._run = 0
        return self._take_new_text(text)

    def close(self) -> str:
        """Return the text held back; an incomplete character becomes the replacement character."""
        return self._take_new_text(self._text(self._start, len(self._ids)))

    def _take_new_text(self, text: str) -> str:
        piece = text[len(self._text(self._start, self._read)) :]
        if piece:
            self._start, self._read = self._read, len(self._ids)
        return piece

    def _text(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text


def _partial_stop_length(text: str, stops: tuple[str, ...]) -> int:
    """Return how many characters at the end of a text could start a stop sequence."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
