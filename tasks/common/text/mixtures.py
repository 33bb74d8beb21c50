"""Sampling of training batches from the token shards: windows or whole documents, mixed in fixed proportions.

Every batch is a pure function of the step, so a resumed run reads the same batches as an uninterrupted one.
"""

from collections.abc import Mapping
from typing import Annotated
from zlib import crc32

import numpy as np
from pydantic import AfterValidator, Field

from tasks.common.harness.job import StageError
from tasks.common.random_streams import Stream, generator
from tasks.common.text.shards import Ids, Split, TokenStream


def _validate_weights(weights: dict[str, float]) -> dict[str, float]:
    bad = [name for name, weight in weights.items() if weight <= 0]
    if bad:
        raise ValueError(f"each weight must be above 0, unlike {', '.join(bad)}; remove kinds that should not be read")
    if abs(sum(weights.values()) - 1) > 1e-6:
        raise ValueError(f"the weights must sum to 1; they sum to {sum(weights.values()):g}")
    return weights


Weights = Annotated[
    dict[str, float],
    Field(
        description="Share of each kind of text: `statements` (documents with names of entities), `prose` (all "
        "others), a source's group or a source's name; the shares sum to 1",
        min_length=1,
    ),
    AfterValidator(_validate_weights),
]


class Windows:
    """An endless sequence of windows of a token stream; window number i depends on nothing but i.

    Every epoch cuts the stream at another offset and visits its windows in another order; both depend only on the seed,
    the kind of text and the epoch. The order of one epoch stays in memory, 8 bytes a window.
    """

    def __init__(self, stream: TokenStream, length: int, seed: int, kind: str = "") -> None:
        if len(stream) < 2 * length:
            raise StageError(
                f"found {len(stream)} tokens of {kind or 'text'}, but windows of {length} tokens need at least "
                f"{2 * length}: add text of this kind, remove it from the mixture, or shorten the window."
            )
        self.stream, self.length, self.seed, self.kind = stream, length, seed, crc32(kind.encode())
        self.per_epoch = len(stream) // length - 1
        self._epochs: dict[int, tuple[int, Ids]] = {}

    def starts(self, numbers: Ids) -> Ids:
        """Return the stream positions at which the windows of these numbers (N,) start, shape (N,)."""
        result = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(numbers // self.per_epoch):
            offset, order = self._epoch(int(epoch))
            in_epoch = numbers // self.per_epoch == epoch
            result[in_epoch] = offset + order[numbers[in_epoch] % self.per_epoch] * self.length
        return result

    def _epoch(self, epoch: int) -> tuple[int, Ids]:
        if epoch not in self._epochs:
            random = generator(self.seed, Stream.WINDOWS, self.kind, epoch)
            self._epochs = {epoch: (int(random.integers(self.length)), random.permutation(self.per_epoch))}
        return self._epochs[epoch]

    def batch(self, numbers: Ids) -> Ids:
        """Return the token ids of the windows of these numbers (N,), shape (N, length)."""
        return self.stream.read(self.starts(numbers)[:, None] + np.arange(self.length))


def apportion(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """Return how many of `count` windows each kind gets, by the largest-remainder method.

    Raises StageError if a kind would get none, because it would never be read.
    """
    exact = {kind: weight * count for kind, weight in weights.items()}
    counts = {kind: int(share + 1e-9) for kind, share in exact.items()}
    order = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in order[: count - sum(counts.values())]:
        counts[kind] += 1
    for kind, number in counts.items():
        if not number:
            raise StageError(
                f"the mixture gives {kind} {weights[kind]:g} of {count} windows a step, which is less than one window: "
                "raise the batch size or the weight."
            )
    return counts


class Mixture:
    """Batches of windows of several kinds of text in fixed proportions; a batch is a pure function of the step."""

    def __init__(self, split: Split, length: int, batch: int, weights: Mapping[str, float], seed: int) -> None:
        self.counts = apportion(weights, batch)
        self.streams = {kind: Windows(split.stream(split.select(kind)), length, seed, kind) for kind in self.counts}

    def batch(self, step: int, rows: slice = slice(None)) -> Ids:
        """Return token ids, shape (batch, length); only the selected rows are read."""
        chosen, found, first = np.arange(sum(self.counts.values()))[rows], [], 0
        for kind, count in self.counts.items():
            of_kind = chosen[(chosen >= first) & (chosen < first + count)] - first
            found.append(self.streams[kind].batch(step * count + of_kind))
            first += count
        return np.concatenate(found)


class DocumentBatches:
    """Batches of whole documents of similar length, for models that read one text per row; a function of the step.

    Documents with names are read only if they hold exactly two, so that either can be predicted from the other.
    Documents of more than `max_length` tokens are truncated. `document_counts` holds how many are read, truncated and
    left out. An epoch reads as much as the mixture allows without reading a document twice. Its documents are shuffled,
    sorted by length within large chunks, cut into batches of at most `budget` tokens with padding, and shuffled again.
    """

    CHUNK_DOCUMENTS = 4096

    def __init__(self, split: Split, budget: int, max_length: int, weights: Mapping[str, float], seed: int) -> None:
        self.split, self.budget, self.max_length, self.seed = split, budget, max_length, seed
        self.first_name = np.searchsorted(split.names[:, 0], split.documents)
        lengths = np.diff(split.documents)
        self.lengths = np.minimum(lengths, max_length)
        selected = {kind: split.select(kind) for kind in weights}
        self.kinds = {kind: self._readable(documents, kind) for kind, documents in selected.items()}
        readable, in_mixture = (np.unique(np.concatenate([*found.values()])) for found in (self.kinds, selected))
        self.document_counts = {
            "documents": len(readable),
            "documents_truncated": int((lengths[readable] > max_length).sum()),
            "documents_skipped": len(in_mixture) - len(readable),
        }
        tokens = {kind: int(self.lengths[documents].sum()) for kind, documents in self.kinds.items()}
        epoch_tokens = min(tokens[kind] / weight for kind, weight in weights.items())
        self.counts = {
            kind: max(1, round(weight * epoch_tokens / tokens[kind] * len(self.kinds[kind])))
            for kind, weight in weights.items()
        }
        self.epochs: list[list[Ids]] = []

    def _readable(self, documents: Ids, kind: str) -> Ids:
        names = self.split.name_counts[documents]
        chosen: Ids = documents[(names == 0) | (names == 2)]
        if not len(chosen):
            raise StageError(
                f"the mixture names {kind}, but none of its documents holds exactly two names or no name, so none can "
                "be read: change `mixture`."
            )
        return chosen

    def documents_at(self, step: int) -> Ids:
        """Return the numbers of the documents that a step reads, shape (B,)."""
        epoch = 0
        while True:
            if epoch == len(self.epochs):
                self.epochs.append(self._epoch(epoch))
            if step < len(self.epochs[epoch]):
                return self.epochs[epoch][step]
            step -= len(self.epochs[epoch])
            epoch += 1

    def _epoch(self, epoch: int) -> list[Ids]:
        random = generator(self.seed, Stream.DOCUMENTS, epoch)
        chosen = [
            documents if self.counts[kind] == len(documents) else random.permutation(documents)[: self.counts[kind]]
            for kind, documents in self.kinds.items()
        ]
        documents = random.permutation(np.concatenate(chosen))
        batches: list[Ids] = []
        for start in range(0, len(documents), self.CHUNK_DOCUMENTS):
            chunk = documents[start : start + self.CHUNK_DOCUMENTS]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")[::-1]]
            first = 0
            while first < len(chunk):
                rows = max(1, self.budget // int(self.lengths[chunk[first]]))
                batches.append(chunk[first : first + rows])
                first += rows
        return [batches[i] for i in random.permutation(len(batches))]

    def read(self, documents: Ids, pad_id: int) -> tuple[Ids, Ids, list[tuple[int, int, int]]]:
        """Return ids and attention mask (B, T), right-padded with `pad_id`, and (row, start, end) of every name."""
        width = int(self.lengths[documents].max())
        ids = np.full((len(documents), width), pad_id, dtype=np.int64)
        names: list[tuple[int, int, int]] = []
        for row, document in enumerate(documents):
            start, length = int(self.split.documents[document]), int(self.lengths[document])
            ids[row, :length] = self.split.tokens[start : start + length]
            spans = self.split.names[self.first_name[document] : self.first_name[document + 1]] - start
            names += [(row, int(a), int(b)) for a, b in spans if b <= length]
        mask = (np.arange(width) < self.lengths[documents][:, None]).astype(np.int64)
        return ids, mask, names
