"""The format of packed token shards: `tokenize` writes them, the training stages read them memory-mapped.

A split is a folder of five arrays: `tokens.npy` (all documents end to end, each between BOS and EOS), `documents.npy`
(the offset of each document, and the total at the end), `names.npy` (start and end token of every name, for whole-name
masking), `sources.npy` (each document's index into `sources.json`, which lists the sources' names and groups) and
`bytes.npy` (the length of each document's text in UTF-8 bytes). They are appended to on disk as documents arrive and
are never in memory as a whole.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from tasks.common.harness.job import StageError
from tasks.common.harness.records import write_json

Ids = npt.NDArray[np.int64]
BUILTIN_KINDS = ("statements", "prose")  # documents with names of entities, and documents without
MAX_SOURCES = 2**16
BLOCK_DOCUMENTS = 1000  # documents that are written at once


@dataclass(frozen=True)
class Document:
    """One encoded text: its token ids, the (start, end) token span of each name, its source and its length."""

    ids: Sequence[int] | npt.NDArray[np.integer]
    names: Sequence[tuple[int, int]]
    source: str = ""
    group: str | None = None
    bytes: int = 0  # of the text in UTF-8


class NpyWriter:
    """Appends rows to a `.npy` file; on exit the row count is written into the header, where numpy leaves room."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, *row_shape: int) -> None:
        self.dtype, self.row_shape, self.rows = np.dtype(dtype), row_shape, 0
        self.file = path.open("wb")
        self._write_header()

    def append(self, rows: npt.ArrayLike) -> None:
        """Append rows."""
        array = np.asarray(rows, dtype=self.dtype).reshape(-1, *self.row_shape)
        self.file.write(array.tobytes())
        self.rows += len(array)

    def _write_header(self) -> None:
        shape = (self.rows, *self.row_shape)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the number of rows into the header and close the file."""
        self.file.seek(0)
        self._write_header()
        self.file.close()


def write_split(path: Path, documents: Iterable[Document], vocabulary: int) -> dict[str, int]:
    """Write one split block by block and return its counts of documents, tokens and names."""
    path.mkdir(parents=True)
    sources: dict[tuple[str, str | None], int] = {}
    with ExitStack() as stack:
        tokens = stack.enter_context(NpyWriter(path / "tokens.npy", np.uint16 if vocabulary <= 2**16 else np.uint32))
        starts = stack.enter_context(NpyWriter(path / "documents.npy", np.int64))
        names = stack.enter_context(NpyWriter(path / "names.npy", np.int64, 2))
        origins = stack.enter_context(NpyWriter(path / "sources.npy", np.uint16))
        sizes = stack.enter_context(NpyWriter(path / "bytes.npy", np.int64))
        starts.append([0])
        iterator = iter(documents)
        while block := list(islice(iterator, BLOCK_DOCUMENTS)):
            ends = tokens.rows + np.cumsum([len(document.ids) for document in block])
            for document, end in zip(block, ends, strict=True):
                if document.names:
                    names.append(np.asarray(document.names) + (end - len(document.ids)))
            tokens.append(np.concatenate([document.ids for document in block]))
            starts.append(ends)
            origins.append([_source_number(sources, document) for document in block])
            sizes.append([document.bytes for document in block])
    write_json(path / "sources.json", [{"name": name, "group": group} for name, group in sources])
    return {"documents": origins.rows, "tokens": tokens.rows, "names": names.rows}


def _source_number(sources: dict[tuple[str, str | None], int], document: Document) -> int:
    number = sources.setdefault((document.source, document.group), len(sources))
    if number == MAX_SOURCES:
        raise StageError(
            f"the corpus has more than {MAX_SOURCES} sources: give the same name to sources that belong together."
        )
    return number


@dataclass(frozen=True)
class Split:
    """One split of the shards, memory-mapped: the arrays stay on disk until they are sliced."""

    tokens: npt.NDArray[np.integer]
    documents: Ids
    names: Ids
    sources: npt.NDArray[np.integer]
    origins: Sequence[Mapping[str, str | None]]  # name and group of each source
    bytes: Ids  # of each document's text

    @classmethod
    def open(cls, path: Path) -> "Split":
        """Memory-map the arrays of a split's folder."""
        tokens, documents, names, sources, sizes = (
            np.load(path / f"{name}.npy", mmap_mode="r")
            for name in ("tokens", "documents", "names", "sources", "bytes")
        )
        origins = json.loads((path / "sources.json").read_text(encoding="utf-8"))
        return cls(tokens, documents, names, sources, origins, sizes)

    @cached_property
    def name_counts(self) -> Ids:
        """The number of names in each document, shape (documents,)."""
        return np.diff(np.searchsorted(self.names[:, 0], self.documents))

    def select(self, kind: str) -> Ids:
        """Return the numbers of the documents of a kind, a source's group or a source's name, in ascending order.

        Raises StageError if there are none.
        """
        if kind in BUILTIN_KINDS:
            chosen = np.flatnonzero((self.name_counts > 0) == (kind == "statements"))
        else:
            numbers = [number for number, origin in enumerate(self.origins) if kind in origin.values()]
            chosen = np.flatnonzero(np.isin(self.sources, numbers))
        if not len(chosen):
            known = sorted({str(name) for origin in self.origins for name in origin.values() if name})
            raise StageError(
                f"the mixture names {kind}, but the corpus has no such text: name one of {', '.join(known)}, or "
                f"{' or '.join(BUILTIN_KINDS)} for all documents with or without names."
            )
        return chosen

    def stream(self, chosen: Ids) -> "TokenStream":
        """Return the chosen documents as one token stream."""
        return TokenStream(self.tokens, self.documents[chosen], np.diff(self.documents)[chosen])


@dataclass(frozen=True)
class TokenStream:
    """Documents end to end, without a copy: a stream position is mapped to its document by binary search."""

    tokens: npt.NDArray[np.integer]
    starts: Ids
    lengths: Ids

    @cached_property
    def ends(self) -> Ids:
        """The stream position after each document's last token."""
        return np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, positions: Ids) -> Ids:
        """Return the tokens at stream positions, in the positions' shape."""
        found = np.searchsorted(self.ends, positions, side="right")
        offsets = self.starts[found] - (self.ends[found] - self.lengths[found])
        return np.asarray(self.tokens[positions + offsets], dtype=np.int64)
