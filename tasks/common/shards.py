"""Packed token shards: what `tokenize` writes and the training stages read, memory-mapped.

A split is a folder of three arrays: `tokens.npy` (all documents end to end, each between its start and end token),
`documents.npy` (where each document starts, with the total at the end) and `names.npy` (start and end token of every
name, for whole-name masking).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tasks.common.stage import StageError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """One encoded text: its token ids and the (start, end) token span of each name in it."""

    ids: Sequence[int]
    names: Sequence[tuple[int, int]]


def write_split(path: Path, documents: Iterable[Document], vocabulary: int) -> dict[str, int]:
    """Write one split and return its counts of documents, tokens and names."""
    tokens: list[int] = []
    starts, names = [0], list[tuple[int, int]]()
    for document in documents:
        names += [(starts[-1] + start, starts[-1] + end) for start, end in document.names]
        tokens += document.ids
        starts.append(len(tokens))
    path.mkdir(parents=True)
    np.save(path / "tokens.npy", np.array(tokens, dtype=np.uint16 if vocabulary <= 2**16 else np.uint32))
    np.save(path / "documents.npy", np.array(starts, dtype=np.int64))
    np.save(path / "names.npy", np.array(names, dtype=np.int64).reshape(-1, 2))
    return {"documents": len(starts) - 1, "tokens": len(tokens), "names": len(names)}


@dataclass(frozen=True)
class Split:
    """One split of the shards; the arrays stay on disk until they are sliced."""

    tokens: npt.NDArray[np.integer]
    documents: Ids
    names: Ids

    @classmethod
    def open(cls, path: Path) -> "Split":
        """Map the arrays of a split's folder."""
        arrays = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("tokens", "documents", "names"))
        return cls(*arrays)

    def select(self, statements: bool) -> "Split":
        """Return the documents that hold names (statements) or those that hold none (prose), packed end to end."""
        named = np.zeros(len(self.documents) - 1, dtype=bool)
        named[np.searchsorted(self.documents, self.names[:, 0], side="right") - 1] = True
        keep = np.flatnonzero(named == statements)
        lengths = np.diff(self.documents)[keep]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.zeros(len(named), dtype=np.int64)
        shift[keep] = starts[:-1] - self.documents[keep]
        pieces = [self.tokens[self.documents[i] : self.documents[i + 1]] for i in keep]
        tokens = np.concatenate(pieces) if pieces else self.tokens[:0]
        names = self.names + shift[np.searchsorted(self.documents, self.names[:, 0], side="right") - 1][:, None]
        return Split(tokens, starts, names if statements else self.names[:0])


class Windows:
    """Windows of a token stream, a pure function of the step, so that a resumed run reads what it would have read.

    Every epoch cuts the stream at another offset and visits its windows in another order; both come from the seed and
    the epoch alone.
    """

    def __init__(self, split: Split, length: int, seed: int) -> None:
        if len(split.tokens) < 2 * length:
            raise StageError(
                f"the text to read holds {len(split.tokens)} tokens; windows of {length} need at least {2 * length}. "
                "Statements are the texts that hold names, prose those that hold none: give more text of the missing "
                "kind, ask for none of it (`statements`, or the weight of the mix), or make the window shorter."
            )
        self.split, self.length, self.seed = split, length, seed
        self.per_epoch = len(split.tokens) // length - 1

    def starts(self, first: int, count: int) -> Ids:
        """Return where the windows number `first` … `first + count - 1` of the endless sequence start in the stream."""
        wanted = np.arange(first, first + count)
        result = np.empty(count, dtype=np.int64)
        for epoch in np.unique(wanted // self.per_epoch):
            random = np.random.default_rng([self.seed, int(epoch)])
            offset, order = random.integers(self.length), random.permutation(self.per_epoch)
            mine = wanted // self.per_epoch == epoch
            result[mine] = offset + order[wanted[mine] % self.per_epoch] * self.length
        return result

    def batch(self, first: int, count: int) -> Ids:
        """Return windows as token ids, shape (count, length)."""
        places = self.starts(first, count)[:, None] + np.arange(self.length)
        return np.asarray(self.split.tokens[places], dtype=np.int64)


class Mixture:
    """Windows of statements and of prose in a fixed proportion; a batch is a pure function of the step."""

    def __init__(self, split: Split, length: int, batch: int, statements: float, seed: int) -> None:
        counts = {True: round(batch * statements)}
        counts[False] = batch - counts[True]
        self.counts = {kind: count for kind, count in counts.items() if count}
        self.streams = {kind: Windows(split.select(statements=kind), length, seed + kind) for kind in self.counts}

    def batch(self, step: int) -> Ids:
        """Return token ids, shape (batch, length)."""
        return np.concatenate([self.streams[k].batch(step * n, n) for k, n in self.counts.items()])


class Batches:
    """Batches of whole documents of like length, a pure function of the step; for models that read one text at a time.

    Statements are here the documents with two names, either of which can be told from the other. An epoch reads every
    statement once and as much prose (documents without names) as keeps the statements' share of the tokens. Its
    documents are shuffled, sorted by length within large chunks, cut into batches whose padded size stays within the
    budget, and shuffled again.
    """

    CHUNK = 4096

    def __init__(self, split: Split, budget: int, longest: int, statements: float, seed: int) -> None:
        self.split, self.budget, self.longest, self.seed = split, budget, longest, seed
        self.first_name = np.searchsorted(split.names[:, 0], split.documents)
        self.lengths = np.minimum(np.diff(split.documents), longest)
        names = np.diff(self.first_name)
        self.statements, self.prose = np.flatnonzero(names == (2 if statements else -1)), np.flatnonzero(names == 0)
        wanted = self.lengths[self.statements].sum() * (1 - statements) / max(statements, 1e-9)
        share = wanted / max(self.lengths[self.prose].sum(), 1)
        self.prose_count = min(round(share * len(self.prose)), len(self.prose)) if statements else len(self.prose)
        if not len(self.statements) + self.prose_count:
            kind = "holds two names" if statements else "is free of names"
            raise StageError(f"no text of the corpus {kind}, so there is nothing to read; change `statements`.")
        self.epochs: list[list[Ids]] = []

    def at(self, step: int) -> Ids:
        """Return the numbers of the documents that a step reads."""
        epoch = 0
        while True:
            if epoch == len(self.epochs):
                self.epochs.append(self._epoch(epoch))
            if step < len(self.epochs[epoch]):
                return self.epochs[epoch][step]
            step -= len(self.epochs[epoch])
            epoch += 1

    def _epoch(self, epoch: int) -> list[Ids]:
        random = np.random.default_rng([self.seed, epoch])
        documents = np.concatenate([self.statements, random.permutation(self.prose)[: self.prose_count]])
        documents = random.permutation(documents)
        batches: list[Ids] = []
        for start in range(0, len(documents), self.CHUNK):
            chunk = documents[start : start + self.CHUNK]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")[::-1]]
            at = 0
            while at < len(chunk):
                rows = max(1, self.budget // int(self.lengths[chunk[at]]))
                batches.append(chunk[at : at + rows])
                at += rows
        return [batches[i] for i in random.permutation(len(batches))]

    def read(self, documents: Ids, fill: int) -> tuple[Ids, Ids, list[tuple[int, int, int]]]:
        """Return ids and attention mask (B, T), padded on the right, and (row, start, end) of every name in them."""
        width = int(self.lengths[documents].max())
        ids = np.full((len(documents), width), fill, dtype=np.int64)
        names: list[tuple[int, int, int]] = []
        for row, document in enumerate(documents):
            start, length = int(self.split.documents[document]), int(self.lengths[document])
            ids[row, :length] = self.split.tokens[start : start + length]
            spans = self.split.names[self.first_name[document] : self.first_name[document + 1]] - start
            names += [(row, int(a), int(b)) for a, b in spans if b <= length]
        mask = (np.arange(width) < self.lengths[documents][:, None]).astype(np.int64)
        return ids, mask, names
