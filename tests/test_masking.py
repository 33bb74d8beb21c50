"""Masking by tokens, words, spans and whole names: which tokens are replaced and which are targets."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tasks.common.training.losses import IGNORE_INDEX
from tasks.pretrain.masking import Masker, Masking, Vocabulary
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


def masked_batches(steps: int, *, named: bool = False, **masking: Any) -> Iterator[tuple[Array, Array, Array]]:
    """Yield ids, masked ids and targets of `steps` batches."""
    masker = Masker(Masking.model_validate({"unit": "token", "share": 0.15, "names": 0.0, **masking}), VOCABULARY)
    for step in range(steps):
        random = np.random.default_rng([0, step])
        ids = texts(random)
        spans = [(row, *span) for row in range(ROWS) for span in SPANS] if named else []
        yield ids, *masker.mask_batch(ids, spans, random)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_tokens_are_masked_80_10_10(unit: str) -> None:
    """Of 15 % of the tokens, 80 % become the mask token, 10 % another token and 10 % stay (Devlin et al. 2019, 3.1)."""
    target_count = total = 0
    replacements = np.zeros(3)
    for ids, masked_ids, targets in masked_batches(400, unit=unit):
        is_target = targets != IGNORE_INDEX
        assert (targets[is_target] == ids[is_target]).all()
        assert (masked_ids[~is_target] == ids[~is_target]).all()
        total += ROWS * (WIDTH - 2)
        target_count += int(is_target.sum())
        masks, same = masked_ids[is_target] == MASK, masked_ids[is_target] == ids[is_target]
        replacements += (masks.sum(), (~masks & ~same).sum(), same.sum())
    # 33,600 of 224,000 tokens. By tokens that is a standard deviation of 0.1 % in the first rate and of 0.2 % in the
    # others; spans of 3.8 words of 2 tokens share a draw, which triples it.
    assert target_count / total == pytest.approx(0.15, abs=0.006 if unit != "span" else 0.012)
    assert replacements / target_count == pytest.approx([0.8, 0.1, 0.1], abs=0.012 if unit != "span" else 0.03)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_special_tokens_are_never_masked_or_substituted(unit: str) -> None:
    """Start, end and padding are never targets, and no token is replaced by one of them."""
    substitutes = set()
    for ids, masked_ids, targets in masked_batches(60, unit=unit, share=0.9):
        assert (targets[ids < SPECIAL] == IGNORE_INDEX).all()
        assert (masked_ids[ids < SPECIAL] == ids[ids < SPECIAL]).all()
        substitutes |= set(masked_ids[masked_ids != ids].tolist())
    assert min(substitutes - {MASK}) >= SPECIAL
    assert len(substitutes) > 0.9 * (SIZE - SPECIAL)


def word_numbers(ids: Array) -> Array:
    """Return the index of each token's word."""
    return VOCABULARY.word_starts[ids].cumsum(1)


def test_words_are_masked_whole() -> None:
    """All tokens of a word are targets or none is; with unit token that does not hold."""
    broken = {"word": 0, "token": 0}
    for unit in broken:
        for ids, _, targets in masked_batches(30, unit=unit):
            numbers = word_numbers(ids)
            for row in range(ROWS):
                inner = slice(1, WIDTH - 1)
                is_target, words = targets[row, inner] != IGNORE_INDEX, numbers[row, inner]
                broken[unit] += sum(len(set(is_target[words == word].tolist())) > 1 for word in set(words.tolist()))
    assert broken["word"] == 0
    assert broken["token"] > 100


def test_span_lengths_match_spanbert() -> None:
    """Runs of up to 10 whole words with one replacement; the mean is about 3.8 words (Joshi et al. 2020, 3.1)."""
    lengths = []
    for ids, masked_ids, targets in masked_batches(300, unit="span", share=0.05):
        numbers = word_numbers(ids)
        for row in range(ROWS):
            is_target = (targets[row] != IGNORE_INDEX) & (ids[row] >= SPECIAL)
            words = sorted({int(word) for word in numbers[row][is_target]})
            runs = np.split(words, np.flatnonzero(np.diff(words) > 1) + 1) if words else []
            inside = [run for run in runs if run[0] > numbers[row, 1] and run[-1] < numbers[row, WIDTH - 2]]
            lengths += [len(run) for run in inside]
            fates = {
                int(run[0]): masked_ids[row][np.isin(numbers[row], run) & is_target] == MASK
                for run in runs
                if len(run) < 3
            }
            broken = [fate for fate in fates.values() if len(set(fate.tolist())) > 1]
            assert len(broken) <= 1  # adjacent spans are replaced independently
    # Rows are 14 words long, which cuts the long ones off: the untouched are somewhat shorter than 3.8.
    assert 2.5 < np.mean(lengths) < 3.9
    assert max(lengths) >= 8


def test_names_are_masked_whole() -> None:
    """At most one name of a text is masked, every token of it a target; the other name stays."""
    counts: dict[Any, int] = {SPANS[0]: 0, SPANS[1]: 0, None: 0}
    for ids, masked_ids, targets in masked_batches(20, named=True):
        assert (targets[:, 3:6] == IGNORE_INDEX).all()  # with a share of 0 no name is hidden
        assert (masked_ids[:, 9:13] == ids[:, 9:13]).all()
    masker = Masker(Masking(unit="token", share=0.15, names=0.6), VOCABULARY)
    for step in range(100):
        random = np.random.default_rng([1, step])
        ids = texts(random)
        masked_ids, targets = masker.mask_batch(ids, [(row, *span) for row in range(ROWS) for span in SPANS], random)
        for row in range(ROWS):
            masked_spans = [span for span in SPANS if (targets[row, slice(*span)] != IGNORE_INDEX).any()]
            counts[masked_spans[0] if masked_spans else None] += 1
            assert len(masked_spans) <= 1
            for span in SPANS:
                place = slice(*span)
                assert (masked_ids[row, place] == (MASK if span in masked_spans else ids[row, place])).all()
                assert (targets[row, place] == (ids[row, place] if span in masked_spans else IGNORE_INDEX)).all()
    shares = [counts[span] / (100 * ROWS) for span in (*SPANS, None)]
    assert shares == pytest.approx([0.3, 0.3, 0.4], abs=0.04)  # 2,000 texts: a standard deviation of 1 %


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_a_batch_has_at_least_one_target(unit: str) -> None:
    """The loss is defined even if no token is chosen."""
    for _, _, targets in masked_batches(20, unit=unit, share=1e-9):
        assert (targets != IGNORE_INDEX).sum() == 1


def test_word_starts_match_the_tokenizer(chain: Chain) -> None:
    """A space starts a word, punctuation is a word by itself, and continuations belong to the word."""
    tokenizer = chain.tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer.encode("The museum, unforgettable.", add_special_tokens=False)
    tokens: Any = tokenizer.convert_ids_to_tokens(ids)
    begins = [token for token, begin in zip(tokens, vocabulary.word_starts[ids], strict=True) if begin]
    assert [token for token in begins if token not in ",."] == [t for t in tokens if t.startswith("Ġ")]
    assert {",", "."} <= set(begins)
    assert vocabulary.special[[tokenizer.bos_token_id, tokenizer.mask_token_id]].all()
    assert len(vocabulary.ordinary) == len(tokenizer) - vocabulary.special.sum()
