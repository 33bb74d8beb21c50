"""Packed shards and batches: nothing is lost, and a batch is a pure function of the step."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from tasks.common.harness.job import StageError
from tasks.common.text.mixtures import DocumentBatches, Mixture, Weights, Windows, apportion
from tasks.common.text.shards import Document, Split, TokenStream, write_split

FILL = 0
HALVES = {"statements": 0.5, "prose": 0.5}
SOURCES = (("atlas", "reference"), ("novels", "books"), ("essays", "books"), ("pages", None))


def documents(count: int, seed: int = 0) -> list[Document]:
    """Return documents of 4 to 20 distinct tokens; every third has two names, one in six has one."""
    random = np.random.default_rng(seed)
    result, token = [], 1
    for index in range(count):
        length = int(random.integers(4, 21))
        names = {0: [(1, 2), (2, 4)], 1: [(1, 3)] if index % 2 else []}.get(index % 3, [])
        result.append(Document(list(range(token, token + length)), names, *SOURCES[index % 4]))
        token += length
    return result


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """A split of sixty documents, written and reopened."""
    write_split(tmp_path / "split", documents(60), vocabulary=2**16)
    return Split.open(tmp_path / "split")


def texts(split: Split) -> list[list[int]]:
    """Return a split's documents as lists of tokens."""
    return [split.tokens[a:b].tolist() for a, b in zip(split.documents, split.documents[1:], strict=False)]


def names(split: Split) -> list[list[int]]:
    """Return the tokens of a split's names."""
    return [split.tokens[a:b].tolist() for a, b in split.names]


def test_shards_round_trip(split: Split) -> None:
    """Documents, in order, and the tokens of each of their names."""
    written = documents(60)
    assert texts(split) == [list(document.ids) for document in written]
    assert names(split) == [list(document.ids[a:b]) for document in written for a, b in document.names]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_id_width_follows_from_the_vocabulary_size(vocabulary: int, dtype: type, tmp_path: Path) -> None:
    """The largest id of a vocabulary survives."""
    write_split(tmp_path / "split", [Document([vocabulary - 1], [])], vocabulary)
    tokens = Split.open(tmp_path / "split").tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [vocabulary - 1]


def whole(split: Split) -> TokenStream:
    """Return all documents as one stream."""
    return split.stream(np.arange(60))


def streamed(stream: TokenStream) -> list[int]:
    """Return all tokens of a stream."""
    tokens: list[int] = stream.read(np.arange(len(stream))).tolist()
    return tokens


def test_statements_and_prose_partition_the_documents(split: Split) -> None:
    """The texts with names and those without are all texts."""
    statements, prose = split.select("statements"), split.select("prose")
    assert sorted([*statements, *prose]) == list(range(60))
    assert statements.tolist() == [index for index, document in enumerate(documents(60)) if document.names]
    assert streamed(split.stream(prose)) == [token for index in prose for token in texts(split)[index]]


@pytest.mark.parametrize(
    ("kind", "remainders"), [("books", {1, 2}), ("novels", {1}), ("pages", {3}), ("reference", {0})]
)
def test_documents_are_chosen_by_source_and_by_group(split: Split, kind: str, remainders: set[int]) -> None:
    """A source's or a group's name selects its documents, with and without names."""
    chosen = split.select(kind)
    assert chosen.tolist() == [index for index in range(60) if index % 4 in remainders]
    assert streamed(split.stream(chosen)) == [token for index in chosen for token in texts(split)[index]]


def test_select_unknown_kind_lists_known_kinds(split: Split) -> None:
    """A misspelt group is an error, not an empty stream."""
    with pytest.raises(StageError, match=r"names news, .* name one of atlas, books, essays, novels, pages, reference"):
        Mixture(split, 8, 8, {"statements": 0.5, "news": 0.5}, seed=3)


def test_stream_copies_no_tokens(split: Split) -> None:
    """A stream of a memory-mapped split copies no tokens, so a corpus need not fit into memory."""
    stream = split.stream(split.select("prose"))
    assert stream.tokens is split.tokens
    assert isinstance(stream.tokens, np.memmap)


def test_the_arrays_are_those_that_numpy_writes(tmp_path: Path) -> None:
    """An appended file has the bytes of `np.save`, whatever the block size."""
    many = documents(60) * 40
    write_split(tmp_path / "split", iter(many), 2**16)
    tokens = np.concatenate([document.ids for document in many]).astype(np.uint16)
    starts = np.cumsum([0, *(len(document.ids) for document in many)]).astype(np.int64)
    spans = [(a + at, b + at) for document, at in zip(many, starts, strict=False) for a, b in document.names]
    sources = np.array([index % 60 % 4 for index in range(len(many))], dtype=np.uint16)
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "documents": starts,
        "names": np.array(spans, dtype=np.int64),
        "sources": sources,
    }
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "split" / f"{name}.npy").read_bytes()


def test_split_without_documents_is_valid(tmp_path: Path) -> None:
    """An empty split is valid until it is read."""
    assert write_split(tmp_path / "split", [], 300) == {"documents": 0, "tokens": 0, "names": 0}
    empty = Split.open(tmp_path / "split")
    assert texts(empty) == names(empty) == []


def test_windows_cover_an_epoch_once(split: Split) -> None:
    """The windows of an epoch do not overlap and leave out less than two windows' tokens; each epoch differs."""
    windows = Windows(whole(split), 16, seed=3)
    epochs = [windows.batch(np.arange(windows.per_epoch) + epoch * windows.per_epoch) for epoch in range(2)]
    for rows in epochs:
        assert len(np.unique(rows)) == rows.size  # all tokens of the fixture differ
        assert len(split.tokens) - rows.size < 2 * 16
        assert (np.diff(rows, axis=1) == 1).all()
    assert not np.array_equal(epochs[0], epochs[1])


def test_windows_are_a_function_of_the_step(split: Split) -> None:
    """The sequence does not depend on the batch size, even across epochs; another seed gives another sequence."""
    windows = Windows(whole(split), 8, seed=3)
    all_windows = windows.batch(np.arange(3 * windows.per_epoch))
    steps = reversed(range(len(all_windows) // 7))
    by_step = [Windows(whole(split), 8, seed=3).batch(np.arange(7) + step * 7) for step in steps]
    assert np.array_equal(np.concatenate(by_step[::-1]), all_windows[: len(by_step) * 7])
    assert not np.array_equal(Windows(whole(split), 8, seed=4).batch(np.arange(20)), all_windows[:20])


def test_too_short_stream_is_reported(split: Split) -> None:
    """The message contains both numbers."""
    with pytest.raises(
        StageError, match=rf"found {len(split.tokens)} tokens of .*, but windows of 512 tokens need at least 1024"
    ):
        Windows(whole(split), 512, seed=0)


WEIGHTS = [
    {"statements": 1.0},
    {"prose": 1.0},
    {"statements": 0.75, "prose": 0.25},
    {"prose": 0.5, "books": 0.25, "atlas": 0.25},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_mixture_batches_have_their_shares(split: Split, weights: dict[str, float]) -> None:
    """Every batch has the given number of windows of each kind, and a step always gives the same batch."""
    mixture = Mixture(split, 8, 8, weights, seed=3)
    kinds = [kind for kind, weight in weights.items() for _ in range(round(8 * weight))]
    tokens = {kind: set(streamed(split.stream(split.select(kind)))) for kind in weights}
    batches = [mixture.batch(step) for step in range(5)]
    for step, rows in enumerate(batches):
        assert rows.shape == (8, 8)
        assert all(set(row.tolist()) <= tokens[kind] for kind, row in zip(kinds, rows, strict=True))
        assert np.array_equal(Mixture(split, 8, 8, weights, seed=3).batch(step), rows)
        for part in (slice(1, None, 3), slice(7, None, 8), slice(9, None)):  # the last is empty
            assert np.array_equal(mixture.batch(step, part), rows[part])
    assert not np.array_equal(batches[0], batches[1])


def test_mixture_matches_the_windows_of_each_kind(split: Split) -> None:
    rows = Mixture(split, 8, 4, HALVES, seed=3).batch(1)
    for half, kind in ((rows[:2], "statements"), (rows[2:], "prose")):
        windows = Windows(split.stream(split.select(kind)), 8, 3, kind)
        assert np.array_equal(half, windows.batch(np.arange(2, 4)))


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ({"a": 0.75, "b": 0.25}, 32, {"a": 24, "b": 8}),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, 8, {"a": 4, "b": 2, "c": 2}),
        ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 8, {"a": 3, "b": 3, "c": 2}),
    ],
)
def test_apportion_uses_the_largest_remainder(weights: dict[str, float], count: int, expected: dict[str, int]) -> None:
    """Every kind is within one window of its share, and the counts sum to the batch."""
    assert apportion(weights, count) == expected


def test_apportion_weight_below_one_window_is_an_error() -> None:
    """A kind that would never be read is an error."""
    with pytest.raises(StageError, match=r"gives b 0\.01 of 8 windows a step, which is less than one"):
        apportion({"a": 0.99, "b": 0.01}, 8)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"statements": 0.5, "prose": 0.4}, "the weights must sum to 1; they sum to 0.9"),
        ({"statements": 1.0, "prose": 0.0}, "each weight must be above 0, unlike prose"),
        ({"statements": 1.5, "prose": -0.5}, "each weight must be above 0, unlike prose"),
        ({}, "at least 1 item"),
    ],
)
def test_invalid_weights_are_rejected(weights: dict[str, float], message: str) -> None:
    """Weights must be positive and sum to 1."""
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Weights).validate_python(weights)


@pytest.mark.parametrize("weights", WEIGHTS[:3], ids=str)
def test_epoch_reads_each_document_once_in_the_mixture_shares(split: Split, weights: dict[str, float]) -> None:
    """No text is read twice in an epoch, the shares of tokens match the weights, and one kind is read completely."""
    batches = DocumentBatches(split, 64, 32, weights, seed=3)
    lengths = np.diff(split.documents)
    readable = {kind: {int(n) for n in split.select(kind) if split.name_counts[n] != 1} for kind in weights}
    batches.documents_at(0)
    for epoch in range(2):
        size = len(batches.epochs[0]) * epoch
        counts = Counter(int(n) for step in range(len(batches.epochs[0])) for n in batches.documents_at(size + step))
        assert set(counts.values()) == {1}
        assert set(counts) <= set().union(*readable.values())
        assert any(chosen <= set(counts) for chosen in readable.values())
        for kind, weight in weights.items():
            share = lengths[list(set(counts) & readable[kind])].sum() / lengths[list(counts)].sum()
            assert share == pytest.approx(weight, abs=0.1)
        assert len(batches.epochs) == epoch + 1


def test_batches_stay_within_the_token_budget(split: Split) -> None:
    """The padded size stays within the budget, documents are truncated to `max_length`, and lengths are similar."""
    batches = DocumentBatches(split, 64, 16, HALVES, seed=3)
    widths = []
    for step in range(40):
        ids, mask, _ = batches.read(batches.documents_at(step), FILL)
        assert ids.size <= 64
        assert ids.shape[1] <= 16
        widths.append(mask.sum() / mask.size)
    assert np.mean(widths) > 0.85


def test_batches_are_a_function_of_the_step(split: Split) -> None:
    """Starting in the middle gives the same batches as starting at step 0."""
    first = DocumentBatches(split, 64, 32, HALVES, seed=3)
    expected = [first.documents_at(step).tolist() for step in range(50)]
    resumed = DocumentBatches(split, 64, 32, HALVES, seed=3)
    assert [resumed.documents_at(step).tolist() for step in range(49, -1, -1)][::-1] == expected
    other = DocumentBatches(split, 64, 32, HALVES, seed=4)
    assert [other.documents_at(step).tolist() for step in range(50)] != expected


def test_batch_is_padded_and_has_its_name_spans(split: Split) -> None:
    """Ids, mask and names of a batch match the documents; truncated names are left out."""
    batches = DocumentBatches(split, 400, 6, HALVES, seed=3)
    chosen = np.arange(12)
    ids, mask, name_spans = batches.read(chosen, FILL)
    for row, document in enumerate(documents(60)[:12]):
        first_ids = list(document.ids)[:6]
        assert ids[row].tolist() == first_ids + [FILL] * (ids.shape[1] - len(first_ids))
        assert mask[row].tolist() == [1] * len(first_ids) + [0] * (ids.shape[1] - len(first_ids))
        assert [(a, b) for r, a, b in name_spans if r == row] == document.names
    readable = [document for document in documents(60) if len(document.names) != 1]
    assert batches.document_counts == {
        "documents": len(readable),
        "documents_truncated": sum(len(document.ids) > 6 for document in readable),
        "documents_skipped": 10,
    }
    short = DocumentBatches(split, 400, 3, HALVES, seed=3)
    assert {(a, b) for _, a, b in short.read(chosen, FILL)[2]} == {(1, 2), (1, 3)}


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("statements", [], "names statements, but the corpus has no such text"),
        ("prose", [(1, 2)], "names prose, but the corpus has no such text"),
        ("statements", [(1, 2)], "names statements, but none of its documents holds exactly two names"),
    ],
)
def test_document_batches_without_readable_documents_is_an_error(
    kind: str, name: list[tuple[int, int]], sentence: str, tmp_path: Path
) -> None:
    """Missing texts raise an error instead of an endless search."""
    write_split(tmp_path / "split", [Document(range(1, 9), name)] * 3, 300)
    with pytest.raises(StageError, match=sentence):
        DocumentBatches(Split.open(tmp_path / "split"), 64, 32, {kind: 1.0}, seed=0)
