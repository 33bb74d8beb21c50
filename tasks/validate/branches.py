"""Tells near-duplicate conversations from branches of one conversation, by signatures of their messages.

Branches share their first messages and go on differently: the same question with another answer, or another
continuation. Compared as whole texts they are alike. So two conversations are near-duplicates only if what follows the
messages that they share is similar, and so are their last messages.
"""

from array import array
from collections.abc import Sequence

import numpy as np

from tasks.validate.signatures import Int64, Mask, Matrix, SignatureFile, digest_words, minhash_signatures

Messages = Sequence[Sequence[str]]  # the words of each message of a conversation


class MessageSignatures:
    """The signature and the digest of each message of conversations, which are numbered in the order of `append`."""

    def __init__(self, shingle: int, permutations: int) -> None:
        self.shingle, self.permutations = shingle, permutations
        self._file = SignatureFile(permutations)
        self._digests = array("Q")
        self._starts = array("q", [0])  # of each conversation's messages; the last one is the end of all
        self._branches: set[tuple[int, int]] = set()  # pairs that were compared and are not near-duplicates

    def append(self, conversations: Sequence[Messages]) -> Matrix:
        """Add conversations; return the signatures of the whole of each, shape (conversations, permutations)."""
        messages = [words for conversation in conversations for words in conversation]
        signatures = minhash_signatures(messages, self.shingle, self.permutations)
        self._file.append(signatures)
        self._digests.extend(map(digest_words, messages))
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
        spans = [range(self._starts[number], self._starts[number + 1]) for number in (one, other)]
        first, second = ([self._digests[message] for message in span] for span in spans)
        shared = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if shared is None:  # the same words, or one conversation goes on where the other ends
            similar = len(first) == len(second)
        else:
            rests = [self._file.read_rows(np.arange(span.start + shared, span.stop)) for span in spans]
            whole, last = ([rows.min(axis=0) for rows in rests], [rows[-1] for rows in rests])
            similar = all(float((a == b).mean()) >= jaccard for a, b in (whole, last))
        if not similar:
            self._branches.add((one, other))
        return similar

    def close(self) -> None:
        """Close and delete the file."""
        self._file.close()
