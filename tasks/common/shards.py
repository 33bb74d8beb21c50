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
            raise ValueError(f"the stream holds {len(split.tokens)} tokens; windows of {length} need at least {2 * length}")
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
        return self.cut(self.starts(first, count))

    def cut(self, starts: Ids) -> Ids:
        """Return the windows that begin at the given places, shape (len(starts), length)."""
        return self.split.tokens[starts[:, None] + np.arange(self.length)].astype(np.int64)
