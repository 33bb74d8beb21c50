"""Texts as token ids, many at a time, with the proof that they can be got back; used by `tasks/tokenize.py` alone.

Where a tokenizer is byte-level BPE as GPT-2's (Radford et al. 2019), a text is cut into words by one regular
expression, and the ids of a word do not hang on its neighbours. So each word is encoded once and found in a table from
then on: the ids are those that the tokenizer gives (tests hold the two together), and come several times as fast. Other
tokenizers, and texts with an added token or with signs that are young, take the library's way.
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

# GPT-2's cut into words; in ASCII, which Python's own engine does at twice the speed, and in all of Unicode.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+"
MOST_WORDS = 2**16  # in the table
Ids = npt.NDArray[np.integer]


class NotTheSame(ValueError):
    """A text that the tokenizer does not give back as it was."""

    def __init__(self, text: str, back: str) -> None:
        super().__init__(f"a text does not survive the tokenizer: {text[:80]!r} came back as {back[:80]!r}")


class Encoder:
    """Encodes texts with a fast tokenizer; `lossy` counts those that do not come back, unless they are refused."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", refuse_lossy: bool) -> None:
        import regex
        from tokenizers import Tokenizer

        description = tokenizer.backend_tokenizer.to_str()
        self.backend: Any = Tokenizer.from_str(description)
        self.backend.encode_special_tokens = True  # a text that spells one holds its letters, and not the token
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        self.refuse_lossy, self.lossy = refuse_lossy, 0
        self.added = [token.content for token in self.backend.get_added_tokens_decoder().values() if not token.special]
        self.young = re.compile(f"[{young_signs()}]")
        self.by_words = cuts_as_gpt2(json.loads(description))
        self.ascii_words = re.compile(WORDS.format(L="A-Za-z", N="0-9", S=r"\t-\r ")).findall
        self.all_words = regex.compile(WORDS.format(L=r"\p{L}", N=r"\p{N}", S=r"\s")).findall
        self.words: dict[str, bytes] = _Table(self)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, without start and end; raise NotTheSame where a lossy text is refused."""
        slow = [place for place, text in enumerate(texts) if not self.by_words or self.apart(text)]
        found = dict(zip(slow, self.offsets([texts[place] for place in slow]), strict=True))
        return [found[place][0] if place in found else self._by_words(text) for place, text in enumerate(texts)]

    def apart(self, text: str) -> bool:
        """Return whether a text is more than its words, or holds signs that are young."""
        return any(token in text for token in self.added) or (not text.isascii() and bool(self.young.search(text)))

    def offsets(self, texts: Sequence[str]) -> list[tuple[Ids, list[tuple[int, int]]]]:
        """Return the ids of each text and the (start, end) of each token in it, by the library; check as `encode`."""
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for text, back in zip(texts, self._decode([each.ids for each in encoded]), strict=True):
            self._check(text, back)
        return [(np.array(each.ids, dtype=self.dtype), each.offsets) for each in encoded]

    def _by_words(self, text: str) -> Ids:
        words = self.ascii_words(text) if text.isascii() else self.all_words(text)
        return np.frombuffer(b"".join([self.words[word] for word in words]), dtype=self.dtype)

    def word(self, word: str) -> bytes:
        """Return the bytes of a word's ids; a text comes back if all of its words do, as they are all of it."""
        ids = self.backend.encode(word, add_special_tokens=False).ids
        self._check(word, self._decode([ids])[0])
        return np.array(ids, dtype=self.dtype).tobytes()

    def _decode(self, rows: list[list[int]]) -> list[str]:
        back: list[str] = self.backend.decode_batch(rows, skip_special_tokens=False)
        return back

    def _check(self, text: str, back: str) -> None:
        if text != back:
            if self.refuse_lossy:
                raise NotTheSame(text, back)
            self.lossy += 1


class _Table(dict[str, bytes]):
    """Ids by word; a full table begins anew, so that its size does not hang on the corpus."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def __missing__(self, word: str) -> bytes:
        if len(self) == MOST_WORDS:
            self.clear()
        self[word] = ids = self.encoder.word(word)
        return ids


def young_signs() -> str:
    """Return, as ranges, the characters without a place in Unicode 3.2: engines differ in how young ones they know."""
    known = unicodedata.ucd_3_2_0
    young = [code for code in range(0x10000) if known.category(chr(code)) == "Cn"]
    starts = [code for code in young if known.category(chr(code - 1)) != "Cn"]
    ends = [code for code in young if code == 0xFFFF or known.category(chr(code + 1)) != "Cn"]
    ranges = [*zip(starts, ends, strict=True), (0x10000, 0x10FFFF)]
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in ranges)


def cuts_as_gpt2(description: dict[str, Any]) -> bool:
    """Return whether a tokenizer, in its JSON form, is byte-level BPE with GPT-2's words, so that words stand alone."""
    from tokenizers.pre_tokenizers import ByteLevel

    cut, model, back = description["pre_tokenizer"] or {}, description["model"], description["decoder"] or {}
    return (
        description["normalizer"] is None
        and (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex")) == ("ByteLevel", False, True)
        and back.get("type") == "ByteLevel"
        and (model["type"], model["dropout"], model["continuing_subword_prefix"]) == ("BPE", None, None)
        and model["end_of_word_suffix"] is None
        and set(ByteLevel.alphabet()) <= set(model["vocab"])
    )
