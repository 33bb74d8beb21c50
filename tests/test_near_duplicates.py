"""Near-duplicates: estimates against the plain Jaccard index, planted ones found, the same in every process."""

import os
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from tasks.common.validation import near_duplicates
from tasks.common.validation.near_duplicates import Duplicates, ExactDuplicates, NearDuplicates
from tests.conftest import ROOT

SETTINGS = NearDuplicates(shingle=2, jaccard=0.6, permutations=128, fewest_words=10)
VOCABULARY = [f"word{number}" for number in range(500)]


def text(generator: random.Random, length: int = 60) -> list[str]:
    return generator.choices(VOCABULARY, k=length)


def edited(words: list[str], generator: random.Random) -> list[str]:
    """Return the words with every twentieth changed, dropped or doubled."""
    result = list(words)
    for _ in range(max(len(words) // 20, 1)):
        place, deed = generator.randrange(len(result)), generator.randrange(3)
        result[place : place + 1] = [[generator.choice(VOCABULARY)], [], [result[place]] * 2][deed]
    return result


def jaccard(one: list[str], other: list[str]) -> float:
    """Return the index as it is defined, on pairs of words."""
    left, right = set(pairwise(one)), set(pairwise(other))
    return len(left & right) / len(left | right)


def redundant(documents: list[tuple[list[str], bool]], near: NearDuplicates | None = SETTINGS) -> list[int]:
    """Return the numbers of the documents that are to go, given in two batches."""
    found = Duplicates(ExactDuplicates(fewest_words=3), near)
    found.add(documents[:2])
    found.add(documents[2:])
    same, nearly = found.redundant()
    return np.flatnonzero(same | nearly).tolist()


def test_signatures_estimate_the_jaccard_index() -> None:
    generator = random.Random(1)
    errors = []
    for _ in range(40):
        one = text(generator)
        other = edited(one, generator)
        left, right = near_duplicates.signatures([one, other], SETTINGS)
        errors.append(float((left == right).mean()) - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.03
    assert max(map(abs, errors)) < 4.5 * (0.25 / 128) ** 0.5  # standard deviation of 128 draws is 0.044 at most


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    generator = random.Random(2)
    originals = [text(generator, generator.randrange(30, 120)) for _ in range(400)]
    planted = [edited(words, generator) for words in originals[:200]]
    gone = redundant([(words, False) for words in [*originals, *planted]])
    assert sum(number >= 400 for number in gone) >= 0.95 * 200
    assert sum(number < 400 for number in gone) == 0


def test_the_first_of_a_cluster_stays_and_held_out_comes_before_training() -> None:
    generator = random.Random(3)
    one, other = text(generator), text(generator)
    assert redundant([(one, False), (other, False), (edited(one, generator), False), (one, False)]) == [2, 3]
    assert redundant([(one, False), (other, False), (edited(one, generator), True), (one, False)]) == [0, 3]


def test_near_means_by_a_chain_too() -> None:
    generator = random.Random(4)
    chain = [text(generator, 100)]
    while len(chain) < 8:
        chain.append(edited(chain[-1], generator))
    assert jaccard(chain[0], chain[-1]) < SETTINGS.jaccard
    assert redundant([(words, False) for words in chain]) == list(range(1, 8))


def test_short_documents_are_not_compared() -> None:
    short = VOCABULARY[:9]
    assert redundant([(short, False), ([*short[:8], "other"], False)]) == []
    assert redundant([(short[:2], False), (short[:2], False)]) == []
    assert redundant([(short[:3], False), (short[:3], False)], None) == [1]
    assert redundant([]) == []


@pytest.mark.parametrize(("at_once", "bands"), [(1, 1), (7, 2), (8192, 100)])
def test_what_is_in_memory_at_once_decides_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int, bands: int) -> None:
    generator = random.Random(6)
    originals = [text(generator) for _ in range(30)]
    documents = [(words, False) for words in [*originals, *(edited(words, generator) for words in originals[::2])]]
    documents += [(originals[3], True), (originals[4], False)]
    expected = redundant(documents)
    monkeypatch.setattr(near_duplicates, "AT_ONCE", at_once)
    monkeypatch.setattr(near_duplicates, "BANDS_AT_ONCE", bands)
    assert redundant(documents) == expected
    assert len(expected) == 17


def test_many_copies_cost_no_more_than_their_number() -> None:
    generator = random.Random(5)
    one = text(generator)
    copies = [(edited(one, generator), False) for _ in range(2000)]
    assert len(redundant(copies)) > 1900


@pytest.mark.parametrize("jaccard_index", [0.3, 0.5, 0.6, 0.8, 0.95])
def test_bands_find_a_pair_at_the_threshold(jaccard_index: float) -> None:
    rows = near_duplicates.rows_of_a_band(jaccard_index, 128)
    generator = np.random.default_rng(1)
    agree = generator.random((20_000, 128 // rows, rows)) < jaccard_index
    found = float(np.mean(np.any(np.all(agree, 2), 1)))
    assert found >= near_duplicates.FOUND - 0.005


def test_signatures_are_the_same_in_every_process() -> None:
    code = (
        "from tasks.common.validation import near_duplicates as n; import hashlib;"
        "s = n.NearDuplicates(shingle=2, jaccard=0.6, permutations=128, fewest_words=10);"
        "w = [[f'word{a * b % 97}' for b in range(80)] for a in range(1, 300)];"
        "print(hashlib.sha256(n.signatures(w, s).tobytes()).hexdigest())"
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
