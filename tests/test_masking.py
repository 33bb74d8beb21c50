"""Masking: what is hidden and what is asked, by tokens, words and spans, and whole names."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tasks.common.text.masking import Masker, Masking, Vocabulary
from tasks.common.training.losses import IGNORED
from tests.training_fixtures import Chain, chain

__all__ = ["chain"]

SIZE, SPECIAL, MASK, BOS, END = 400, 7, 3, 1, 2
ROWS, WIDTH = 20, 30
BEGINS = np.arange(SIZE) % 2 == 0  # even tokens begin a word
VOCABULARY = Vocabulary(MASK, np.arange(SPECIAL, SIZE), np.arange(SIZE) < SPECIAL, BEGINS | (np.arange(SIZE) < SPECIAL))
SPANS = [(3, 6), (9, 13)]

Array = np.ndarray[Any, Any]


def texts(random: np.random.Generator, rows: int = ROWS) -> Array:
    """Return random texts between their start and end tokens."""
    inner = random.integers(SPECIAL, SIZE, (rows, WIDTH - 2))
    return np.concatenate([np.full((rows, 1), BOS), inner, np.full((rows, 1), END)], 1)


def hidden(steps: int, *, named: bool = False, **masking: Any) -> Iterator[tuple[Array, Array, Array]]:
    """Yield ids, hidden ids and targets of so many batches."""
    masker = Masker(Masking.model_validate({"unit": "token", "share": 0.15, "names": 0.0, **masking}), VOCABULARY)
    for step in range(steps):
        random = np.random.default_rng([0, step])
        ids = texts(random)
        spans = [(row, *span) for row in range(ROWS) for span in SPANS] if named else []
        yield ids, *masker.hide(ids, spans, random)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_tokens_are_masked_80_10_10(unit: str) -> None:
    """Of 15 % of the tokens, 80 % become the mask, 10 % another token and 10 % stay (Devlin et al. 2019, 3.1)."""
    asked = total = 0
    fates = np.zeros(3)
    for ids, given, targets in hidden(400, unit=unit):
        places = targets != IGNORED
        assert (targets[places] == ids[places]).all()
        assert (given[~places] == ids[~places]).all()
        total += ROWS * (WIDTH - 2)
        asked += int(places.sum())
        masks, same = given[places] == MASK, given[places] == ids[places]
        fates += (masks.sum(), (~masks & ~same).sum(), same.sum())
    # 33,600 of 224,000 tokens. By tokens that is a standard deviation of 0.1 % in the first rate and of 0.2 % in the
    # others; spans of 3.8 words of 2 tokens share a lot, which makes it three times as much.
    assert asked / total == pytest.approx(0.15, abs=0.006 if unit != "span" else 0.012)
    assert fates / asked == pytest.approx([0.8, 0.1, 0.1], abs=0.012 if unit != "span" else 0.03)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_special_tokens_are_neither_hidden_nor_drawn(unit: str) -> None:
    """Start, end and padding are never asked for, and no token is replaced by one of them."""
    drawn = set()
    for ids, given, targets in hidden(60, unit=unit, share=0.9):
        assert (targets[ids < SPECIAL] == IGNORED).all()
        assert (given[ids < SPECIAL] == ids[ids < SPECIAL]).all()
        drawn |= set(given[given != ids].tolist())
    assert min(drawn - {MASK}) >= SPECIAL
    assert len(drawn) > 0.9 * (SIZE - SPECIAL)


def word_numbers(ids: Array) -> Array:
    """Return the number of the word that each token of a text belongs to."""
    return VOCABULARY.begins[ids].cumsum(1)


def test_words_are_asked_whole() -> None:
    """Either all tokens of a word are asked for or none; with single tokens that is not so."""
    broken = {"word": 0, "token": 0}
    for unit in broken:
        for ids, _, targets in hidden(30, unit=unit):
            numbers = word_numbers(ids)
            for row in range(ROWS):
                inner = slice(1, WIDTH - 1)
                asked, words = targets[row, inner] != IGNORED, numbers[row, inner]
                broken[unit] += sum(len(set(asked[words == word].tolist())) > 1 for word in set(words.tolist()))
    assert broken["word"] == 0
    assert broken["token"] > 100


def test_spans_are_some_words_long() -> None:
    """Whole words in rows of up to 10 that share a fate; a mean of about 3.8 words (Joshi et al. 2020, 3.1)."""
    lengths = []
    for ids, given, targets in hidden(300, unit="span", share=0.05):
        numbers = word_numbers(ids)
        for row in range(ROWS):
            asked = (targets[row] != IGNORED) & (ids[row] >= SPECIAL)
            words = sorted({int(word) for word in numbers[row][asked]})
            runs = np.split(words, np.flatnonzero(np.diff(words) > 1) + 1) if words else []
            inside = [run for run in runs if run[0] > numbers[row, 1] and run[-1] < numbers[row, WIDTH - 2]]
            lengths += [len(run) for run in inside]
            fates = {
                int(run[0]): given[row][np.isin(numbers[row], run) & asked] == MASK for run in runs if len(run) < 3
            }
            broken = [fate for fate in fates.values() if len(set(fate.tolist())) > 1]
            assert len(broken) <= 1  # two spans that touch have two fates
    # Rows are 14 words long, which cuts the long ones off: the untouched are somewhat shorter than 3.8.
    assert 2.5 < np.mean(lengths) < 3.9
    assert max(lengths) >= 8


def test_names_are_hidden_whole() -> None:
    """One name of a text or none, each of its tokens by a mask, all of them asked; the other name stays in sight."""
    counts: dict[Any, int] = {SPANS[0]: 0, SPANS[1]: 0, None: 0}
    for ids, given, targets in hidden(20, named=True):
        assert (targets[:, 3:6] == IGNORED).all()  # with a share of 0 no name is hidden
        assert (given[:, 9:13] == ids[:, 9:13]).all()
    masker = Masker(Masking(unit="token", share=0.15, names=0.6), VOCABULARY)
    for step in range(100):
        random = np.random.default_rng([1, step])
        ids = texts(random)
        given, targets = masker.hide(ids, [(row, *span) for row in range(ROWS) for span in SPANS], random)
        for row in range(ROWS):
            asked = [span for span in SPANS if (targets[row, slice(*span)] != IGNORED).any()]
            counts[asked[0] if asked else None] += 1
            assert len(asked) <= 1
            for span in SPANS:
                place = slice(*span)
                assert (given[row, place] == (MASK if span in asked else ids[row, place])).all()
                assert (targets[row, place] == (ids[row, place] if span in asked else IGNORED)).all()
    shares = [counts[span] / (100 * ROWS) for span in (*SPANS, None)]
    assert shares == pytest.approx([0.3, 0.3, 0.4], abs=0.04)  # 2,000 texts: a standard deviation of 1 %


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_a_step_always_asks_something(unit: str) -> None:
    """Where chance hides nothing at all, the loss is still a number."""
    for _, _, targets in hidden(20, unit=unit, share=1e-9):
        assert (targets != IGNORED).sum() == 1


def test_words_begin_where_the_tokenizer_says(chain: Chain) -> None:
    """A space opens a word, a mark is one by itself, and the rest of a word belongs to it."""
    tokenizer = chain.tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer.encode("The museum, unforgettable.", add_special_tokens=False)
    tokens: Any = tokenizer.convert_ids_to_tokens(ids)
    begins = [token for token, begin in zip(tokens, vocabulary.begins[ids], strict=True) if begin]
    assert [token for token in begins if token not in ",."] == [t for t in tokens if t.startswith("Ġ")]
    assert {",", "."} <= set(begins)
    assert vocabulary.special[[tokenizer.bos_token_id, tokenizer.mask_token_id]].all()
    assert len(vocabulary.ordinary) == len(tokenizer) - vocabulary.special.sum()
