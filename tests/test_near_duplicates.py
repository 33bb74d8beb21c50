"""Near-duplicates: MinHash estimates against the Jaccard index, recall, the same bytes in every process."""

import os
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from tasks.validate import near_duplicates, signatures
from tasks.validate.near_duplicates import DuplicateFinder, ExactDuplicates, NearDuplicates
from tests.conftest import ROOT

SETTINGS = NearDuplicates(shingle=2, min_jaccard=0.6, permutations=128, min_words=10)
VOCABULARY = [f"word{number}" for number in range(500)]


def make_text(generator: random.Random, length: int = 60) -> list[str]:
    return generator.choices(VOCABULARY, k=length)


def edit_words(words: list[str], generator: random.Random) -> list[str]:
    """Return the words with one in twenty replaced, deleted or repeated."""
    result = list(words)
    for _ in range(max(len(words) // 20, 1)):
        position, edit = generator.randrange(len(result)), generator.randrange(3)
        result[position : position + 1] = [[generator.choice(VOCABULARY)], [], [result[position]] * 2][edit]
    return result


def jaccard(one: list[str], other: list[str]) -> float:
    """Return the exact Jaccard index on pairs of words."""
    left, right = set(pairwise(one)), set(pairwise(other))
    return len(left & right) / len(left | right)


def find_redundant(documents: list[tuple[list[str], bool]], near: NearDuplicates | None = SETTINGS) -> list[int]:
    """Return the numbers of the redundant documents, added in two batches."""
    finder = DuplicateFinder(ExactDuplicates(min_words=3), near)
    finder.add(documents[:2])
    finder.add(documents[2:])
    exact, near_duplicate = finder.find_redundant()
    return np.flatnonzero(exact | near_duplicate).tolist()


def test_signatures_estimate_the_jaccard_index() -> None:
    generator = random.Random(1)
    errors = []
    for _ in range(40):
        one = make_text(generator)
        other = edit_words(one, generator)
        left, right = signatures.minhash_signatures([one, other], SETTINGS.shingle, SETTINGS.permutations)
        errors.append(float((left == right).mean()) - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.03
    assert max(map(abs, errors)) < 4.5 * (0.25 / 128) ** 0.5  # standard deviation of 128 draws is 0.044 at most


def test_only_planted_near_duplicates_are_found() -> None:
    generator = random.Random(2)
    originals = [make_text(generator, generator.randrange(30, 120)) for _ in range(400)]
    planted = [edit_words(words, generator) for words in originals[:200]]
    rejected = find_redundant([(words, False) for words in [*originals, *planted]])
    assert sum(number >= 400 for number in rejected) >= 0.95 * 200
    assert sum(number < 400 for number in rejected) == 0


def test_the_first_document_of_a_cluster_is_kept_heldout_before_training() -> None:
    generator = random.Random(3)
    one, other = make_text(generator), make_text(generator)
    assert find_redundant([(one, False), (other, False), (edit_words(one, generator), False), (one, False)]) == [2, 3]
    assert find_redundant([(one, False), (other, False), (edit_words(one, generator), True), (one, False)]) == [0, 3]


def test_a_chain_of_near_duplicates_is_one_cluster() -> None:
    generator = random.Random(4)
    chain = [make_text(generator, 100)]
    while len(chain) < 8:
        chain.append(edit_words(chain[-1], generator))
    assert jaccard(chain[0], chain[-1]) < SETTINGS.min_jaccard
    assert find_redundant([(words, False) for words in chain]) == list(range(1, 8))


def test_short_documents_are_not_compared() -> None:
    short = VOCABULARY[:9]
    assert find_redundant([(short, False), ([*short[:8], "other"], False)]) == []
    assert find_redundant([(short[:2], False), (short[:2], False)]) == []
    assert find_redundant([(short[:3], False), (short[:3], False)], None) == [1]
    assert find_redundant([]) == []


@pytest.mark.parametrize(("batch_signatures", "bands"), [(1, 1), (7, 2), (8192, 100)])
def test_batch_size_does_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, batch_signatures: int, bands: int
) -> None:
    generator = random.Random(6)
    originals = [make_text(generator) for _ in range(30)]
    documents = [(words, False) for words in [*originals, *(edit_words(words, generator) for words in originals[::2])]]
    documents += [(originals[3], True), (originals[4], False)]
    expected = find_redundant(documents)
    monkeypatch.setattr(signatures, "BATCH_SIGNATURES", batch_signatures)
    monkeypatch.setattr(near_duplicates, "BANDS_PER_PASS", bands)
    assert find_redundant(documents) == expected
    assert len(expected) == 17


def test_many_copies_are_found_in_linear_time() -> None:
    generator = random.Random(5)
    one = make_text(generator)
    copies = [(edit_words(one, generator), False) for _ in range(2000)]
    assert len(find_redundant(copies)) > 1900


@pytest.mark.parametrize("jaccard_index", [0.3, 0.5, 0.6, 0.8, 0.95])
def test_bands_find_a_pair_at_the_threshold(jaccard_index: float) -> None:
    rows = near_duplicates.max_band_rows(jaccard_index, 128)
    generator = np.random.default_rng(1)
    agree = generator.random((20_000, 128 // rows, rows)) < jaccard_index
    share_found = float(np.mean(np.any(np.all(agree, 2), 1)))
    assert share_found >= near_duplicates.MIN_RECALL - 0.005


def test_signatures_are_the_same_in_every_process() -> None:
    code = (
        "from tasks.validate.signatures import minhash_signatures; import hashlib;"
        "w = [[f'word{a * b % 97}' for b in range(80)] for a in range(1, 300)];"
        "print(hashlib.sha256(minhash_signatures(w, 2, 128).tobytes()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for more in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1"})
    }
    assert len(seen) == 1
