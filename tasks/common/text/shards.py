"""Packed token shards: what `tokenize` writes and the training stages read, memory-mapped.

A split is a folder of five arrays: `tokens.npy` (all documents end to end, each between its start and end token),
`documents.npy` (where each document starts, with the total at the end), `names.npy` (start and end token of every
name, for whole-name masking), `sources.npy` (the number of each document's source in `sources.json`, which says the
sources' names and groups) and `bytes.npy` (how long each document's text is in UTF-8). They grow on disk while
documents come, and are never held in memory whole.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Annotated
from zlib import crc32

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field

from tasks.common.stage import StageError, write_json

Ids = npt.NDArray[np.int64]
KINDS = ("statements", "prose")  # all documents that hold names of entities, and all that hold none
MOST_SOURCES = 2**16
AT_ONCE = 1000  # documents that are written together


def _whole(weights: dict[str, float]) -> dict[str, float]:
    bad = [name for name, weight in weights.items() if weight <= 0]
    if bad:
        raise ValueError(f"each weight is above 0 (leave out what is not to be read), unlike {', '.join(bad)}")
    if abs(sum(weights.values()) - 1) > 1e-6:
        raise ValueError(f"the weights must sum to 1; they sum to {sum(weights.values()):g}")
    return weights


Weights = Annotated[
    dict[str, float],
    Field(
        description="Share of the text by what it is: `statements` (documents with names of entities), `prose` (all "
        "others), a source's group or a source's name; the shares sum to 1",
        min_length=1,
    ),
    AfterValidator(_whole),
]


@dataclass(frozen=True)
class Document:
    """One encoded text: its token ids, the (start, end) span of each name in them, its source, and its length."""

    ids: Sequence[int] | npt.NDArray[np.integer]
    names: Sequence[tuple[int, int]]
    source: str = ""
    group: str | None = None
    bytes: int = 0  # of the text in UTF-8


class Array:
    """A `.npy` file that rows are added to; the header, for which numpy leaves room, is written again at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, *rest: int) -> None:
        self.dtype, self.rest, self.rows = np.dtype(dtype), rest, 0
        self.file = path.open("wb")
        self._head()

    def append(self, rows: npt.ArrayLike) -> None:
        """Add rows."""
        array = np.asarray(rows, dtype=self.dtype).reshape(-1, *self.rest)
        self.file.write(array.tobytes())
        self.rows += len(array)

    def _head(self) -> None:
        shape = (self.rows, *self.rest)
        described = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, described)

    def __enter__(self) -> "Array":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the number of rows into the header and close the file."""
        self.file.seek(0)
        self._head()
        self.file.close()


def write_split(path: Path, documents: Iterable[Document], vocabulary: int) -> dict[str, int]:
    """Write one split, document by document, and return its counts of documents, tokens and names."""
    path.mkdir(parents=True)
    sources: dict[tuple[str, str | None], int] = {}
    with ExitStack() as stack:
        tokens = stack.enter_context(Array(path / "tokens.npy", np.uint16 if vocabulary <= 2**16 else np.uint32))
        starts = stack.enter_context(Array(path / "documents.npy", np.int64))
        names = stack.enter_context(Array(path / "names.npy", np.int64, 2))
        origins = stack.enter_context(Array(path / "sources.npy", np.uint16))
        sizes = stack.enter_context(Array(path / "bytes.npy", np.int64))
        starts.append([0])
        iterator = iter(documents)
        while block := list(islice(iterator, AT_ONCE)):
            ends = tokens.rows + np.cumsum([len(document.ids) for document in block])
            for document, end in zip(block, ends, strict=True):
                if document.names:
                    names.append(np.asarray(document.names) + (end - len(document.ids)))
            tokens.append(np.concatenate([document.ids for document in block]))
            starts.append(ends)
            origins.append([_number(sources, document) for document in block])
            sizes.append([document.bytes for document in block])
    write_json(path / "sources.json", [{"name": name, "group": group} for name, group in sources])
    return {"documents": origins.rows, "tokens": tokens.rows, "names": names.rows}


def _number(sources: dict[tuple[str, str | None], int], document: Document) -> int:
    number = sources.setdefault((document.source, document.group), len(sources))
    if number == MOST_SOURCES:
        raise StageError(
            f"the corpus has more than {MOST_SOURCES} sources; give one name to those that belong together."
        )
    return number


@dataclass(frozen=True)
class Split:
    """One split of the shards; the arrays stay on disk until they are sliced."""

    tokens: npt.NDArray[np.integer]
    documents: Ids
    names: Ids
    sources: npt.NDArray[np.integer]
    origins: Sequence[Mapping[str, str | None]]  # name and group of each source
    bytes: Ids  # of each document's text

    @classmethod
    def open(cls, path: Path) -> "Split":
        """Map the arrays of a split's folder."""
        tokens, documents, names, sources, sizes = (
            np.load(path / f"{name}.npy", mmap_mode="r")
            for name in ("tokens", "documents", "names", "sources", "bytes")
        )
        origins = json.loads((path / "sources.json").read_text(encoding="utf-8"))
        return cls(tokens, documents, names, sources, origins, sizes)

    @cached_property
    def names_in(self) -> Ids:
        """The number of names in each document."""
        return np.diff(np.searchsorted(self.names[:, 0], self.documents))

    def select(self, kind: str) -> Ids:
        """Return the numbers of the documents that a mixture calls so; raise StageError where there are none."""
        if kind in KINDS:
            chosen = np.flatnonzero((self.names_in > 0) == (kind == "statements"))
        else:
            meant = [number for number, origin in enumerate(self.origins) if kind in origin.values()]
            chosen = np.flatnonzero(np.isin(self.sources, meant))
        if not len(chosen):
            called = sorted({str(name) for origin in self.origins for name in origin.values() if name})
            raise StageError(
                f"the mixture asks for {kind}, of which the corpus holds no text; there are {', '.join(called)}, and "
                f"{' and '.join(KINDS)} for all documents with and without names."
            )
        return chosen

    def stream(self, chosen: Ids) -> "Stream":
        """Return some of the documents, packed end to end."""
        return Stream(self.tokens, self.documents[chosen], np.diff(self.documents)[chosen])


@dataclass(frozen=True)
class Stream:
    """Documents end to end, without a copy of them: a place in the stream is looked up among where they end."""

    tokens: npt.NDArray[np.integer]
    starts: Ids
    lengths: Ids

    @cached_property
    def ends(self) -> Ids:
        """Where each document ends in the stream."""
        return np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, places: Ids) -> Ids:
        """Return the tokens at the places, in the places' shape."""
        found = np.searchsorted(self.ends, places, side="right")
        offsets = self.starts[found] - (self.ends[found] - self.lengths[found])
        return np.asarray(self.tokens[places + offsets], dtype=np.int64)


class Windows:
    """Windows of a token stream, a pure function of the step, so that a resumed run reads what it would have read.

    Every epoch cuts the stream at another offset and visits its windows in another order; both come from the seed and
    the epoch alone. The order of one epoch, 8 bytes a window, is kept.
    """

    def __init__(self, stream: Stream, length: int, seed: int) -> None:
        if len(stream) < 2 * length:
            raise StageError(
                f"the text to read holds {len(stream)} tokens; windows of {length} need at least {2 * length}. "
                "Give more text of this kind, leave it out of the mixture, or make the window shorter."
            )
        self.stream, self.length, self.seed = stream, length, seed
        self.per_epoch = len(stream) // length - 1
        self._epochs: dict[int, tuple[int, Ids]] = {}

    def starts(self, wanted: Ids) -> Ids:
        """Return where the windows of these numbers, of the endless sequence, start in the stream."""
        result = np.empty(len(wanted), dtype=np.int64)
        for epoch in np.unique(wanted // self.per_epoch):
            offset, order = self._epoch(int(epoch))
            mine = wanted // self.per_epoch == epoch
            result[mine] = offset + order[wanted[mine] % self.per_epoch] * self.length
        return result

    def _epoch(self, epoch: int) -> tuple[int, Ids]:
        if epoch not in self._epochs:
            random = np.random.default_rng([self.seed, epoch])
            self._epochs = {epoch: (int(random.integers(self.length)), random.permutation(self.per_epoch))}
        return self._epochs[epoch]

    def batch(self, wanted: Ids) -> Ids:
        """Return the windows of these numbers (N,) as token ids, shape (N, length)."""
        return self.stream.read(self.starts(wanted)[:, None] + np.arange(self.length))


def apportion(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """Return how many of `count` windows each kind gets: its share, rounded by the largest remainder.

    Raise StageError where a kind would get none, for then it would never be read.
    """
    exact = {kind: weight * count for kind, weight in weights.items()}
    counts = {kind: int(share + 1e-9) for kind, share in exact.items()}
    order = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in order[: count - sum(counts.values())]:
        counts[kind] += 1
    for kind, number in counts.items():
        if not number:
            raise StageError(
                f"the mixture gives {kind} {weights[kind]:g} of {count} windows a step, which is less than one: make "
                "the batch larger, or the weight."
            )
    return counts


class Mixture:
    """Windows of several kinds of text in a fixed proportion; a batch is a pure function of the step."""

    # Others have a seed from their name. These two had theirs before there were others.
    SEEDS: Mapping[str, int] = {"prose": 0, "statements": 1}

    def __init__(self, split: Split, length: int, batch: int, weights: Mapping[str, float], seed: int) -> None:
        self.counts = apportion(weights, batch)
        self.streams = {
            kind: Windows(split.stream(split.select(kind)), length, seed + self.SEEDS.get(kind, crc32(kind.encode())))
            for kind in self.counts
        }

    def batch(self, step: int, rows: slice = slice(None)) -> Ids:
        """Return token ids, shape (batch, length); of some of the rows alone without reading the others."""
        chosen, found, first = np.arange(sum(self.counts.values()))[rows], [], 0
        for kind, count in self.counts.items():
            mine = chosen[(chosen >= first) & (chosen < first + count)] - first
            found.append(self.streams[kind].batch(step * count + mine))
            first += count
        return np.concatenate(found)


class Batches:
    """Batches of whole documents of like length, a pure function of the step; for models that read one text at a time.

    Of documents with names only those with two are read: either can be told from the other; of longer ones than
    `longest` their beginning. `counted` says how many are so cut and left out. An epoch reads as much as the mixture
    allows without reading a document twice. Its documents are shuffled, sorted by length within large chunks, cut into
    batches whose padded size stays within the budget, and shuffled again.
    """

    CHUNK = 4096

    def __init__(self, split: Split, budget: int, longest: int, weights: Mapping[str, float], seed: int) -> None:
        self.split, self.budget, self.longest, self.seed = split, budget, longest, seed
        self.first_name = np.searchsorted(split.names[:, 0], split.documents)
        whole = np.diff(split.documents)
        self.lengths = np.minimum(whole, longest)
        meant = {kind: split.select(kind) for kind in weights}
        self.kinds = {kind: self._told_apart(documents, kind) for kind, documents in meant.items()}
        kept, all_meant = (np.unique(np.concatenate([*found.values()])) for found in (self.kinds, meant))
        self.counted = {
            "documents": len(kept),
            "documents_cut": int((whole[kept] > longest).sum()),
            "documents_left_out": len(all_meant) - len(kept),
        }
        tokens = {kind: int(self.lengths[documents].sum()) for kind, documents in self.kinds.items()}
        most = min(tokens[kind] / weight for kind, weight in weights.items())  # tokens of an epoch
        self.counts = {
            kind: max(1, round(weight * most / tokens[kind] * len(self.kinds[kind])))
            for kind, weight in weights.items()
        }
        self.epochs: list[list[Ids]] = []

    def _told_apart(self, documents: Ids, kind: str) -> Ids:
        names = self.split.names_in[documents]
        chosen: Ids = documents[(names == 0) | (names == 2)]
        if not len(chosen):
            raise StageError(
                f"the mixture asks for {kind}, of which no text holds two names or none, so there is nothing to read; "
                "change `mixture`."
            )
        return chosen

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
        chosen = [
            documents if self.counts[kind] == len(documents) else random.permutation(documents)[: self.counts[kind]]
            for kind, documents in self.kinds.items()
        ]
        documents = random.permutation(np.concatenate(chosen))
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
