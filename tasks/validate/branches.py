"""Tells near-duplicate conversations from branches of one conversation, by signatures of their messages.

Branches share messages: the same question with another answer, another continuation, the same instruction with another
text. Compared as whole texts they are alike. So two conversations are near-duplicates only if they have as many
messages, and each is similar to its counterpart.
"""

from array import array
from collections.abc import Sequence

import numpy as np

from tasks.validate.signatures import Int64, Mask, Matrix, SignatureFile, minhash_signatures

Messages = Sequence[Sequence[str]]  # the words of each message of a conversation


class MessageSignatures:
    """The signature of each message of conversations, which are numbered in the order of `append`."""

    def __init__(self, shingle: int, permutations: int) -> None:
        self.shingle, self.permutations = shingle, permutations
        self._file = SignatureFile(permutations)
        self._starts = array("q", [0])  # of each conversation's messages; the last one is the end of all
        self._branches: set[tuple[int, int]] = set()  # pairs that were compared and are not near-duplicates

    def append(self, conversations: Sequence[Messages]) -> Matrix:
        """Add conversations; return the signatures of the whole of each, shape (conversations, permutations)."""
        messages = [words for conversation in conversations for words in conversation]
        signatures = minhash_signatures(messages, self.shingle, self.permutations)
        self._file.append(signatures)
        starts = np.cumsum([0, *map(len, conversations)])
        self._starts.extend((self._starts[-1] + starts[1:]).tolist())
        whole: Matrix = np.minimum.reduceat(signatures, starts[:-1], axis=0)
        return whole

    def mask_similar(self, pairs: Int64, jaccard: float) -> Mask:
        """Return a mask of the pairs of conversations, shape (pairs, 2), that are near-duplicates."""
        return np.array([self._is_similar(one, other, jaccard) for one, other in pairs.tolist()], bool)

    def _is_similar(self, one: int, other: int, jaccard: float) -> bool:
        if (one, other) in self._branches:
            return False
        starts = [self._starts[number] for number in (one, other)]
        lengths = [self._starts[number + 1] - start for number, start in zip((one, other), starts, strict=True)]
        similar = lengths[0] == lengths[1]
        if similar:
            first, second = (self._file.read_span(start, lengths[0]) for start in starts)
            similar = bool(((first == second).mean(axis=1) >= jaccard).all())
        if not similar:
            self._branches.add((one, other))
        return similar

    def close(self) -> None:
        """Close and delete the file."""
        self._file.close()
