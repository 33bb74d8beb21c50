"""MinHash signatures of documents (Broder 1997), computed by Rensa and kept in a temporary file."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

HASH_SEED = 1  # of the MinHash functions
BATCH_SIGNATURES = 1 << 13  # signatures in memory at once: 8 MB at 256 hash functions
Int64 = np.ndarray[Any, np.dtype[np.int64]]
UInt64 = np.ndarray[Any, np.dtype[np.uint64]]
Matrix = np.ndarray[Any, np.dtype[np.uint32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class SignatureFile:
    """A matrix of signatures, shape (documents, permutations), in a temporary file.

    The file is read, not memory-mapped: mapped pages count as memory of this process until the kernel reclaims them.
    """

    def __init__(self, permutations: int) -> None:
        self.permutations, self.width = permutations, 4 * permutations
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `close` closes it

    def append(self, rows: Matrix) -> None:
        """Append signatures, shape (documents, permutations)."""
        self._file.write(rows.tobytes())

    def iter_batches(self) -> Iterator[Matrix]:
        """Yield all rows in order, in batches of BATCH_SIGNATURES."""
        start = 0
        while content := os.pread(self._file.fileno(), BATCH_SIGNATURES * self.width, start):
            yield np.frombuffer(content, np.uint32).reshape(-1, self.permutations)
            start += len(content)

    def read_rows(self, numbers: Int64) -> Matrix:
        """Return the rows with these numbers."""
        content = [os.pread(self._file.fileno(), self.width, self.width * number) for number in numbers.tolist()]
        return np.frombuffer(b"".join(content), np.uint32).reshape(-1, self.permutations)

    def read_span(self, start: int, count: int) -> Matrix:
        """Return `count` rows from row `start` on."""
        content = os.pread(self._file.fileno(), self.width * count, self.width * start)
        return np.frombuffer(content, np.uint32).reshape(-1, self.permutations)

    def close(self) -> None:
        """Close and delete the file."""
        self._file.close()


def digest_words(words: Sequence[str]) -> int:
    """Return the 8-byte digest of a document's words."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def minhash_signatures(documents: Sequence[Sequence[str]], shingle: int, permutations: int) -> Matrix:
    """Return the MinHash signatures, shape (documents, permutations), with the same bytes in every process.

    A document shorter than a shingle is a shingle. The signature of several documents together is the least of theirs.
    """
    from rensa import RMinHash

    if not documents:
        return np.empty((0, permutations), np.uint32)
    offsets = range(shingle)
    shingles = [
        [" ".join(found) for found in zip(*(words[start:] for start in offsets), strict=False)] or [" ".join(words)]
        for words in documents
    ]
    matrix = RMinHash.digest_matrix_from_token_sets(shingles, permutations, HASH_SEED)
    return np.array(matrix.to_rows(), np.uint32)
