"""Streams of byte-fallback tokenizers: the pieces join to the whole text, with stray bytes too."""

import random

import pytest
from tokenizers import Tokenizer

from serving.decoding import REPLACEMENT, Answer, IncrementalDecoder
from tests.family_fixtures import FAMILIES, Shape, make_tokenizer

BYTES = (0x0A, 0x41, 0x80, 0x82, 0x9F, 0xA9, 0xAC, 0xC3, 0xE2, 0xF0, 0xFF)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer like Llama 2's."""
    return make_tokenizer(FAMILIES["llama"], Shape()).backend_tokenizer


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.add(token) for token in ids), decoder.close()]


def test_stream_with_stray_bytes_joins_to_the_whole_text(tokenizer: Tokenizer) -> None:
    random.seed(0)
    tokens = [*tokenizer.encode("the river of France", add_special_tokens=False).ids]
    tokens += [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in BYTES]
    for _ in range(300):
        ids = random.choices(tokens, k=random.randrange(1, 24))
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_long_run_of_bytes_is_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    """A language without tokens of its own is written in bytes: 가 takes three."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "가".encode()] * 60
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "가" * 60
    assert sum(map(bool, pieces)) >= 3


class Source:
    """An answer's tokens, all at once."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def take(self, *, whole: bool = False) -> list[int]:
        taken, self.ids = self.ids, []
        return taken

    async def take_async(self, *, whole: bool = False) -> list[int]:
        return self.take()

    def cancel(self) -> None:
        """Nothing runs."""


def test_streamed_answer_with_a_stray_byte_ends_with_its_reason(tokenizer: Tokenizer) -> None:
    words = tokenizer.encode("who said hello", add_special_tokens=False).ids
    ids = [*words, *(tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in (0x0A, 0xF0, 0x9F)), *words]
    streamed = Answer(tokenizer, Source(list(ids)), 99, 1)
    text = "".join(streamed)
    whole = Answer(tokenizer, Source(list(ids)), 99, 1).finish()
    assert text == whole.text
    assert REPLACEMENT in text
    assert streamed.finish_reason == whole.finish_reason == "stop"
