"""Batch encoding of texts to token ids, with a check that decoding returns the text.

A byte-level BPE tokenizer like GPT-2's (Radford et al. 2019) splits a text into words by one regular expression, and
the ids of a word do not depend on its neighbours. So each word is encoded once and then looked up in a cache. The ids
equal the library's (tests compare the two), and encoding is several times as fast. Other tokenizers, and texts with
added tokens or with characters newer than Unicode 3.2, are encoded by the library.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# GPT-2's word pattern, filled in for ASCII (Python's `re` is twice as fast) and for all of Unicode.
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+"
MAX_CACHED_WORDS = 2**16
Ids = npt.NDArray[np.integer]


class RoundTripError(ValueError):
    """A text that is not the same after encoding and decoding."""

    def __init__(self, text: str, decoded: str) -> None:
        super().__init__(f"a text does not survive the tokenizer: {text[:80]!r} came back as {decoded[:80]!r}")


class Encoder:
    """Encodes texts with a fast tokenizer and checks that they round-trip.

    A text that does not raises RoundTripError if `refuse_lossy` is True, else it is counted in `lossy`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", refuse_lossy: bool) -> None:
        import regex
        from tokenizers import Tokenizer

        description = tokenizer.backend_tokenizer.to_str()
        self.backend: Any = Tokenizer.from_str(description)
        self.backend.encode_special_tokens = True  # "<|end|>" in a text is encoded as letters, not as the token
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.refuse_lossy, self.lossy = refuse_lossy, 0
        self.added = [token.content for token in self.backend.get_added_tokens_decoder().values() if not token.special]
        self.recent = re.compile(f"[{recent_characters()}]")
        self.by_words = is_gpt2_bpe(json.loads(description))
        self.ascii_words = re.compile(WORD_PATTERN.format(L="A-Za-z", N="0-9", S=r"\t-\r ")).findall
        self.all_words = regex.compile(WORD_PATTERN.format(L=r"\p{L}", N=r"\p{N}", S=r"\s")).findall
        self.words: dict[str, bytes] = _WordCache(self)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, without BOS and EOS; raise RoundTripError for a lossy text if `refuse_lossy`."""
        slow = [index for index, text in enumerate(texts) if not self.by_words or self.needs_library(text)]
        encoded = dict(zip(slow, self.encode_with_offsets([texts[index] for index in slow]), strict=True))
        return [
            encoded[index][0] if index in encoded else self._encode_by_words(text) for index, text in enumerate(texts)
        ]

    def needs_library(self, text: str) -> bool:
        """Return whether a text contains added tokens or recent characters, which the word cache does not handle."""
        return any(token in text for token in self.added) or (not text.isascii() and bool(self.recent.search(text)))

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[Ids, list[tuple[int, int]]]]:
        """Return the ids of each text and the (start, end) character offsets of each token; check as `encode` does."""
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for text, decoded in zip(texts, self._decode([each.ids for each in encoded]), strict=True):
            self._check_round_trip(text, decoded)
        return [(np.array(each.ids, dtype=self.dtype), each.offsets) for each in encoded]

    def _encode_by_words(self, text: str) -> Ids:
        words = self.ascii_words(text) if text.isascii() else self.all_words(text)
        return np.frombuffer(b"".join([self.words[word] for word in words]), dtype=self.dtype)

    def encode_word(self, word: str) -> bytes:
        """Return a word's ids as bytes, after checking its round trip: a text round-trips if all its words do."""
        ids = self.backend.encode(word, add_special_tokens=False).ids
        self._check_round_trip(word, self._decode([ids])[0])
        return np.array(ids, dtype=self.dtype).tobytes()

    def _decode(self, rows: list[list[int]]) -> list[str]:
        texts: list[str] = self.backend.decode_batch(rows, skip_special_tokens=False)
        return texts

    def _check_round_trip(self, text: str, decoded: str) -> None:
        if text != decoded:
            if self.refuse_lossy:
                raise RoundTripError(text, decoded)
            self.lossy += 1


class _WordCache(dict[str, bytes]):
    """Ids by word; a full cache is cleared, so that its size does not depend on the corpus."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def __missing__(self, word: str) -> bytes:
        if len(self) == MAX_CACHED_WORDS:
            self.clear()
        self[word] = ids = self.encoder.encode_word(word)
        return ids


def recent_characters() -> str:
    """Return the characters that Unicode 3.2 does not assign, as ranges of a regular expression.

    Regular-expression engines support different Unicode versions, so they may classify newer characters differently.
    """
    known = unicodedata.ucd_3_2_0
    unassigned = [code for code in range(0x10000) if known.category(chr(code)) == "Cn"]
    starts = [code for code in unassigned if known.category(chr(code - 1)) != "Cn"]
    ends = [code for code in unassigned if code == 0xFFFF or known.category(chr(code + 1)) != "Cn"]
    ranges = [*zip(starts, ends, strict=True), (0x10000, 0x10FFFF)]
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in ranges)


def is_gpt2_bpe(description: dict[str, Any]) -> bool:
    """Return whether a tokenizer (its JSON) is byte-level BPE with GPT-2's pattern, so that words are independent."""
    from tokenizers.pre_tokenizers import ByteLevel

    split, model, decoder = description["pre_tokenizer"] or {}, description["model"], description["decoder"] or {}
    return (
        description["normalizer"] is None
        and (split.get("type"), split.get("add_prefix_space"), split.get("use_regex")) == ("ByteLevel", False, True)
        and decoder.get("type") == "ByteLevel"
        and (model["type"], model["dropout"], model["continuing_subword_prefix"]) == ("BPE", None, None)
        and model["end_of_word_suffix"] is None
        and set(ByteLevel.alphabet()) <= set(model["vocab"])
    )
