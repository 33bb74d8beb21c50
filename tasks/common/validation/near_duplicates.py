"""Documents that are the same or nearly the same, found by MinHash (Broder 1997) and banding (Leskovec et al., ch. 3).

Rensa makes the signatures; they lie in a file of their own, so that memory holds some dozen bytes a document and never
its text. Each band of a signature puts a document into a bucket; two of one bucket are compared by their signatures,
and those that agree are joined into clusters (connected components). Of a cluster one document is kept: a held-out one
before one for training, because a near copy of held-out text in training is a leak; then the one that comes first.
"""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from tasks.common.settings import Settings

SEED = 1  # of the hash functions: another one finds the same pairs but for chance
FOUND = 0.99  # of the pairs just as similar as the threshold come into a common bucket
AT_ONCE = 1 << 13  # signatures in memory at once: 8 MB at 256 hash functions
BANDS_AT_ONCE = 6  # for which the signatures are read through once; each takes 8 bytes a document
Int64 = np.ndarray[Any, np.dtype[np.int64]]
UInt64 = np.ndarray[Any, np.dtype[np.uint64]]
Matrix = np.ndarray[Any, np.dtype[np.uint32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class ExactDuplicates(Settings):
    """What counts as the same."""

    fewest_words: int = Field(
        description='Words of the shortest document that is compared; short ones ("Thank you.") come again by nature',
        ge=1,
    )


class NearDuplicates(Settings):
    """What counts as nearly the same."""

    shingle: int = Field(description="Words in a row that are compared as one", ge=1, le=32)
    jaccard: float = Field(description="Share of all shingles that two documents must have in common", ge=0.1, le=1)
    permutations: int = Field(description="Hash functions of a signature (4 bytes a document each)", ge=16, le=1024)
    fewest_words: int = Field(description="Words of the shortest document that is compared", ge=1)


class Duplicates:
    """Takes documents in order and says at the end, once, which of them are to go (and lets the file go, too)."""

    def __init__(self, exact: ExactDuplicates | None, near: NearDuplicates | None) -> None:
        self.exact, self.near = exact, near
        self._digests = array("Q")  # of their words; a short one has its number instead, which no other has
        self._heldout = array("b")
        self._signed = array("q")  # which of the documents have a signature
        self._signatures: Signatures | None = None

    def add(self, documents: Sequence[tuple[Sequence[str], bool]]) -> None:
        """Take a batch of documents: words, and whether held out."""
        start = len(self._heldout)
        self._heldout.extend(heldout for _, heldout in documents)
        shortest = self.exact.fewest_words if self.exact else 1
        self._digests.extend(
            _digest(words) if len(words) >= shortest else start + number for number, (words, _) in enumerate(documents)
        )
        if self.near is None:
            return
        fewest = max(self.near.fewest_words, self.near.shingle)
        long = [number for number, (words, _) in enumerate(documents) if len(words) >= fewest]
        self._signed.extend(start + number for number in long)
        if not long:
            return
        if self._signatures is None:
            self._signatures = Signatures(self.near.permutations)
        self._signatures.append(signatures([documents[number][0] for number in long], self.near))

    def redundant(self) -> tuple[Mask, Mask]:
        """Return two masks over all documents: those refused as the same as another, and as nearly the same."""
        count = len(self._heldout)
        train = 1 - np.frombuffer(self._heldout, np.int8)
        rank = train * np.int64(count) + np.arange(count)  # the lowest of a cluster is kept
        same, nearly = np.zeros(count, bool), np.zeros(count, bool)
        if self.exact is not None and count:
            same = _but_the_first(np.unique(np.frombuffer(self._digests, np.uint64), return_inverse=True)[1], rank)
        if self.near is not None and self._signatures is not None:
            signed = np.frombuffer(self._signed, np.int64)
            chosen = ~same[signed]  # what is gone must not decide which one of a cluster stays
            left = signed[chosen]
            nearly[left] = _but_the_first(clusters(self._signatures, chosen, self.near.jaccard), rank[left])
            self._signatures.close()
        return same, nearly


class Signatures:
    """The rows of a matrix (documents, permutations) in a temporary file.

    They are read, not mapped: what is mapped counts as this process's memory for as long as there is no want of it.
    """

    def __init__(self, permutations: int) -> None:
        self.permutations, self.width = permutations, 4 * permutations
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `close` closes it

    def append(self, rows: Matrix) -> None:
        """Add the signatures of some documents."""
        self._file.write(rows.tobytes())

    def parts(self) -> Iterator[Matrix]:
        """Yield all rows in order, some thousand at a time."""
        start = 0
        while content := os.pread(self._file.fileno(), AT_ONCE * self.width, start):
            yield np.frombuffer(content, np.uint32).reshape(-1, self.permutations)
            start += len(content)

    def rows(self, numbers: Int64) -> Matrix:
        """Return some of the rows."""
        found = [os.pread(self._file.fileno(), self.width, self.width * number) for number in numbers.tolist()]
        return np.frombuffer(b"".join(found), np.uint32).reshape(-1, self.permutations)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


def _digest(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def _but_the_first(labels: Int64, rank: Int64) -> Mask:
    """Mark all members of each cluster but the one of the lowest rank."""
    lowest = np.full(labels.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(lowest, labels, rank)
    redundant: Mask = rank != lowest[labels]
    return redundant


def signatures(documents: Sequence[Sequence[str]], settings: NearDuplicates) -> "np.ndarray[Any, np.dtype[np.uint32]]":
    """Return a MinHash signature a document, shape (documents, permutations); the same bytes in every process."""
    from rensa import RMinHash

    if not documents:
        return np.empty((0, settings.permutations), np.uint32)
    offsets = range(settings.shingle)
    shingles = [
        [" ".join(run) for run in zip(*(words[start:] for start in offsets), strict=False)] for words in documents
    ]
    matrix = RMinHash.digest_matrix_from_token_sets(shingles, settings.permutations, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def rows_of_a_band(jaccard: float, permutations: int) -> int:
    """Return the most rows a band may have for pairs at the threshold to meet in a bucket with probability FOUND.

    A band of r equal rows has probability J^r, so b bands find a pair with 1 − (1 − J^r)^b (Leskovec et al., 3.4.2).
    """
    fitting = [
        rows for rows in range(1, permutations + 1) if 1 - (1 - jaccard**rows) ** (permutations // rows) >= FOUND
    ]
    return max(fitting, default=1)


def clusters(signatures: Signatures, chosen: Mask, jaccard: float) -> Int64:
    """Return a label for each signature that is chosen; equal ones are one cluster."""
    rows = rows_of_a_band(jaccard, signatures.permutations)
    bands = [slice(start, start + rows) for start in range(0, signatures.permutations - rows + 1, rows)]
    numbers = np.flatnonzero(chosen)
    labels = np.arange(len(numbers))
    for first in range(0, len(bands), BANDS_AT_ONCE):
        for keys in _keys(signatures, chosen, bands[first : first + BANDS_AT_ONCE]):
            pairs = _in_one_bucket(keys)
            pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]  # those of one cluster would add nothing to it
            alike = [part[_alike(signatures, numbers[part], jaccard)] for part in _parts(pairs)]
            labels = _join(labels, np.concatenate(alike)) if alike else labels
    return labels


def _keys(signatures: Signatures, chosen: Mask, bands: Sequence[slice]) -> list[UInt64]:
    """Return for each band a key a chosen signature; two that are equal in the band have the same."""
    keys = [np.empty(np.count_nonzero(chosen), np.uint64) for _ in bands]
    read = written = 0
    for part in signatures.parts():
        part = part[chosen[read : read + len(part)]]
        for band, key in zip(bands, keys, strict=True):
            key[written : written + len(part)] = _mixed(part[:, band])
        written += len(part)
        read += AT_ONCE
    return keys


def _mixed(columns: Matrix) -> UInt64:
    key = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)  # an odd multiplier mixes; a clash is only compared
        key ^= key >> np.uint64(32)
    return key


def _in_one_bucket(keys: UInt64) -> Int64:
    """Return pairs of documents with one key: each with the one before it and with the first of its bucket.

    All pairs of a bucket would be its size squared; clusters need no more than these, where the bucket is sound.
    """
    order = np.argsort(keys, kind="stable")
    new = np.append(True, keys[order][1:] != keys[order][:-1])
    again = np.flatnonzero(~new)
    opens = np.flatnonzero(new)
    first = order[opens[np.searchsorted(opens, again) - 1]]
    with_first = np.stack([first, order[again]], 1)
    with_last = np.stack([order[again - 1], order[again]], 1)
    return np.concatenate([with_first, with_last[with_last[:, 0] != with_first[:, 0]]])


def _parts(pairs: Int64) -> Iterator[Int64]:
    for start in range(0, len(pairs), AT_ONCE):
        yield pairs[start : start + AT_ONCE]


def _alike(signatures: Signatures, pairs: Int64, jaccard: float) -> Mask:
    """Say which pairs of signatures agree in at least `jaccard` of their places, which estimates the Jaccard index."""
    agree: Mask = (signatures.rows(pairs[:, 0]) == signatures.rows(pairs[:, 1])).mean(1) >= jaccard
    return agree


def _join(labels: Int64, pairs: Int64) -> Int64:
    """Return new labels in which the clusters of each pair are one."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = labels[pairs]
    graph = coo_matrix((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(labels), len(labels)))
    joined: Int64 = connected_components(graph, directed=False)[1]
    return joined[labels]
