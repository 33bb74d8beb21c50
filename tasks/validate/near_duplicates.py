"""Exact and near-duplicate documents, found with MinHash (Broder 1997) and LSH banding (Leskovec et al., ch. 3).

Rensa computes the signatures. They are stored in a temporary file, so that memory holds some dozen bytes a document and
never its text. Each band of a signature puts a document into a bucket. Documents of one bucket are compared by their
signatures, and similar ones are merged into clusters (connected components). One document of each cluster is kept: a
held-out one before a training one, because a near copy of held-out text in training is a leak; then the first one.

Two conversations must also be similar message by message (`branches.py`).
"""

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from pydantic import Field

from tasks.common.settings import Settings
from tasks.validate import signatures as signature_files
from tasks.validate.branches import Messages, MessageSignatures
from tasks.validate.signatures import Int64, Mask, Matrix, SignatureFile, UInt64, digest_words, minhash_signatures

MIN_RECALL = 0.99  # share of pairs at the threshold that must share a bucket
BANDS_PER_PASS = 6  # for which the file is read once; each band takes 8 bytes a document


class ExactDuplicates(Settings):
    """Exact duplicates."""

    min_words: int = Field(
        default=5,
        description='Words of the shortest document that is compared; short ones ("Thank you.") repeat naturally',
        ge=1,
    )


class NearDuplicates(Settings):
    """Near-duplicates."""

    shingle: int = Field(default=3, description="Words of a shingle (an n-gram that is compared)", ge=1, le=32)
    min_jaccard: float = Field(
        default=0.6, description="Minimum Jaccard index of the shingles of two near-duplicates", ge=0.1, le=1
    )
    permutations: int = Field(
        default=128, description="Hash functions of a signature (4 bytes a document each)", ge=16, le=1024
    )
    min_words: int = Field(default=20, description="Words of the shortest document that is compared", ge=1)


class DuplicateFinder:
    """Collects documents in order; `find_redundant`, called once at the end, returns those to reject."""

    def __init__(self, exact: ExactDuplicates | None, near: NearDuplicates | None) -> None:
        self.exact, self.near = exact, near
        self._digests = array("Q")  # of their words; a short document has its unique number instead
        self._heldout = array("b")
        self._signed_documents = array("q")  # numbers of the documents with a signature
        self._signatures: SignatureFile | None = None
        self._messages: MessageSignatures | None = None

    def add(self, documents: Sequence[tuple[Sequence[str], bool]]) -> None:
        """Add a batch of documents: (words, whether held out)."""
        start = self._add_digests(documents)
        if self.near is None:
            return
        numbers = self._sign_long(start, [words for words, _ in documents], self.near)
        if numbers:
            rows = minhash_signatures(
                [documents[number][0] for number in numbers], self.near.shingle, self._permutations
            )
            self._open_signatures().append(rows)

    def add_conversations(self, conversations: Sequence[tuple[Messages, bool]]) -> None:
        """Add a batch of conversations: (the words of each message, whether held out)."""
        joined = [([word for message in messages for word in message], heldout) for messages, heldout in conversations]
        start = self._add_digests(joined)
        if self.near is None:
            return
        numbers = self._sign_long(start, [words for words, _ in joined], self.near)
        if numbers:
            if self._messages is None:
                self._messages = MessageSignatures(self.near.shingle, self.near.permutations)
            self._open_signatures().append(self._messages.append([conversations[number][0] for number in numbers]))

    @property
    def _permutations(self) -> int:
        assert self.near is not None
        return self.near.permutations

    def _open_signatures(self) -> SignatureFile:
        if self._signatures is None:
            self._signatures = SignatureFile(self._permutations)
        return self._signatures

    def _add_digests(self, documents: Sequence[tuple[Sequence[str], bool]]) -> int:
        """Add a batch to the comparison of exact copies; return the number of its first document."""
        start = len(self._heldout)
        self._heldout.extend(heldout for _, heldout in documents)
        shortest = self.exact.min_words if self.exact else 1
        self._digests.extend(
            digest_words(words) if len(words) >= shortest else start + number
            for number, (words, _) in enumerate(documents)
        )
        return start

    def _sign_long(self, start: int, documents: Sequence[Sequence[str]], near: NearDuplicates) -> list[int]:
        """Record the documents of a batch that are long enough to be compared; return their numbers in the batch."""
        min_words = max(near.min_words, near.shingle)
        numbers = [number for number, words in enumerate(documents) if len(words) >= min_words]
        self._signed_documents.extend(start + number for number in numbers)
        return numbers

    def find_redundant(self) -> tuple[Mask, Mask]:
        """Return two masks over all documents, shape (documents,): exact duplicates and near-duplicates to reject.

        The temporary files are closed.
        """
        count = len(self._heldout)
        train = 1 - np.frombuffer(self._heldout, np.int8)
        rank = train * np.int64(count) + np.arange(count)  # the lowest of a cluster is kept
        exact, near = np.zeros(count, bool), np.zeros(count, bool)
        if self.exact is not None and count:
            exact_labels = np.unique(np.frombuffer(self._digests, np.uint64), return_inverse=True)[1]
            exact = _mask_redundant(exact_labels, rank)
        if self.near is not None and self._signatures is not None:
            signed = np.frombuffer(self._signed_documents, np.int64)
            selected = ~exact[signed]  # an exact duplicate must not decide which document of a cluster is kept
            remaining = signed[selected]
            labels = cluster_signatures(self._signatures, selected, self.near.min_jaccard, self._messages)
            near[remaining] = _mask_redundant(labels, rank[remaining])
            self._signatures.close()
            if self._messages is not None:
                self._messages.close()
        return exact, near


def _mask_redundant(labels: Int64, rank: Int64) -> Mask:
    """Return a mask of all members of each cluster but the one of the lowest rank."""
    lowest = np.full(labels.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(lowest, labels, rank)
    redundant: Mask = rank != lowest[labels]
    return redundant


def max_band_rows(jaccard: float, permutations: int) -> int:
    """Return the most rows of a band with which pairs at the threshold share a bucket with probability MIN_RECALL.

    A band of r equal rows has probability J^r, so b bands find a pair with 1 − (1 − J^r)^b (Leskovec et al., 3.4.2).
    """
    valid = [
        rows for rows in range(1, permutations + 1) if 1 - (1 - jaccard**rows) ** (permutations // rows) >= MIN_RECALL
    ]
    return max(valid, default=1)


def cluster_signatures(
    signatures: SignatureFile, selected: Mask, jaccard: float, messages: MessageSignatures | None = None
) -> Int64:
    """Return the cluster label of each selected signature; conversations are compared by their `messages` too."""
    rows = max_band_rows(jaccard, signatures.permutations)
    bands = [slice(start, start + rows) for start in range(0, signatures.permutations - rows + 1, rows)]
    numbers = np.flatnonzero(selected)
    labels = np.arange(len(numbers))
    for first in range(0, len(bands), BANDS_PER_PASS):
        for keys in _band_keys(signatures, selected, bands[first : first + BANDS_PER_PASS]):
            pairs = _bucket_pairs(keys)
            pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]  # skip pairs within one cluster
            similar = [part[_mask_similar(signatures, numbers[part], jaccard)] for part in _batch_pairs(pairs)]
            if messages is not None:
                similar = [part[messages.mask_similar(numbers[part], jaccard)] for part in similar]
            labels = _merge_clusters(labels, np.concatenate(similar)) if similar else labels
    return labels


def _band_keys(signatures: SignatureFile, selected: Mask, bands: Sequence[slice]) -> list[UInt64]:
    """Return the key of each selected signature for each band; signatures that are equal in a band have equal keys."""
    keys = [np.empty(np.count_nonzero(selected), np.uint64) for _ in bands]
    read = written = 0
    for part in signatures.iter_batches():
        part = part[selected[read : read + len(part)]]
        for band, key in zip(bands, keys, strict=True):
            key[written : written + len(part)] = _hash_rows(part[:, band])
        written += len(part)
        read += signature_files.BATCH_SIGNATURES
    return keys


def _hash_rows(columns: Matrix) -> UInt64:
    key = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)  # a collision costs one comparison only
        key ^= key >> np.uint64(32)
    return key


def _bucket_pairs(keys: UInt64) -> Int64:
    """Return pairs of documents with equal keys, shape (pairs, 2): each with the one before it and the bucket's first.

    All pairs of a bucket would be its size squared. These pairs are enough to connect it if its documents are similar.
    """
    order = np.argsort(keys, kind="stable")
    is_start = np.append(True, keys[order][1:] != keys[order][:-1])
    members = np.flatnonzero(~is_start)
    starts = np.flatnonzero(is_start)
    first = order[starts[np.searchsorted(starts, members) - 1]]
    with_first = np.stack([first, order[members]], 1)
    with_previous = np.stack([order[members - 1], order[members]], 1)
    return np.concatenate([with_first, with_previous[with_previous[:, 0] != with_first[:, 0]]])


def _batch_pairs(pairs: Int64) -> Iterator[Int64]:
    for start in range(0, len(pairs), signature_files.BATCH_SIGNATURES):
        yield pairs[start : start + signature_files.BATCH_SIGNATURES]


def _mask_similar(signatures: SignatureFile, pairs: Int64, jaccard: float) -> Mask:
    """Return a mask of the pairs whose estimated Jaccard index, the share of equal hashes, is at least `jaccard`."""
    agree: Mask = (signatures.read_rows(pairs[:, 0]) == signatures.read_rows(pairs[:, 1])).mean(1) >= jaccard
    return agree


def _merge_clusters(labels: Int64, pairs: Int64) -> Int64:
    """Return labels in which the clusters of each pair are merged."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = labels[pairs]
    graph = coo_matrix((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(labels), len(labels)))
    joined: Int64 = connected_components(graph, directed=False)[1]
    return joined[labels]
