"""Packed shards and the batches drawn from them: nothing is lost, and a batch is a pure function of the step."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from tasks.common.stage import StageError
from tasks.common.text.shards import Batches, Document, Mixture, Split, Stream, Weights, Windows, apportion, write_split

FILL = 0
HALVES = {"statements": 0.5, "prose": 0.5}
SOURCES = (("atlas", "reference"), ("novels", "books"), ("essays", "books"), ("pages", None))


def documents(count: int, seed: int = 0) -> list[Document]:
    """Return documents of 4 to 20 tokens, all tokens different; every third has two names, one in six a single one."""
    random = np.random.default_rng(seed)
    result, token = [], 1
    for place in range(count):
        length = int(random.integers(4, 21))
        names = {0: [(1, 2), (2, 4)], 1: [(1, 3)] if place % 2 else []}.get(place % 3, [])
        result.append(Document(list(range(token, token + length)), names, *SOURCES[place % 4]))
        token += length
    return result


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Sixty documents, written and opened again."""
    write_split(tmp_path / "split", documents(60), vocabulary=2**16)
    return Split.open(tmp_path / "split")


def texts(split: Split) -> list[list[int]]:
    """Return a split's documents as lists of tokens."""
    return [split.tokens[a:b].tolist() for a, b in zip(split.documents, split.documents[1:], strict=False)]


def names(split: Split) -> list[list[int]]:
    """Return the tokens of a split's names."""
    return [split.tokens[a:b].tolist() for a, b in split.names]


def test_what_is_written_is_read(split: Split) -> None:
    """Documents, in order, and the tokens of each of their names."""
    written = documents(60)
    assert texts(split) == [list(document.ids) for document in written]
    assert names(split) == [list(document.ids[a:b]) for document in written for a, b in document.names]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_as_many_bytes_as_they_need(vocabulary: int, dtype: type, tmp_path: Path) -> None:
    """The largest id of a vocabulary survives."""
    write_split(tmp_path / "split", [Document([vocabulary - 1], [])], vocabulary)
    tokens = Split.open(tmp_path / "split").tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [vocabulary - 1]


def whole(split: Split) -> Stream:
    """Return all documents as one stream."""
    return split.stream(np.arange(60))


def streamed(stream: Stream) -> list[int]:
    """Return all tokens of a stream."""
    tokens: list[int] = stream.read(np.arange(len(stream))).tolist()
    return tokens


def test_statements_and_prose_part_the_documents(split: Split) -> None:
    """Texts with names and texts without are two streams that hold all texts."""
    statements, prose = split.select("statements"), split.select("prose")
    assert sorted([*statements, *prose]) == list(range(60))
    assert statements.tolist() == [place for place, document in enumerate(documents(60)) if document.names]
    assert streamed(split.stream(prose)) == [token for place in prose for token in texts(split)[place]]


@pytest.mark.parametrize(("kind", "places"), [("books", {1, 2}), ("novels", {1}), ("pages", {3}), ("reference", {0})])
def test_documents_are_chosen_by_source_and_by_group(split: Split, kind: str, places: set[int]) -> None:
    """A source's name and a group's name choose its documents, with names in them or without."""
    chosen = split.select(kind)
    assert chosen.tolist() == [place for place in range(60) if place % 4 in places]
    assert streamed(split.stream(chosen)) == [token for place in chosen for token in texts(split)[place]]


def test_a_kind_that_holds_no_text_is_told_with_those_there_are(split: Split) -> None:
    """A group that is misspelt is no empty stream."""
    with pytest.raises(StageError, match=r"asks for news, .* there are atlas, books, essays, novels, pages, reference"):
        Mixture(split, 8, 8, {"statements": 0.5, "news": 0.5}, seed=3)


def test_a_stream_is_looked_up_not_copied(split: Split) -> None:
    """A stream of a mapped split holds no tokens of its own: a corpus need not fit into memory to be read."""
    stream = split.stream(split.select("prose"))
    assert stream.tokens is split.tokens
    assert isinstance(stream.tokens, np.memmap)


def test_the_arrays_are_those_that_numpy_writes(tmp_path: Path) -> None:
    """What grew on disk has the bytes of a saved array, however many documents were written together."""
    many = documents(60) * 40
    write_split(tmp_path / "split", iter(many), 2**16)
    tokens = np.concatenate([document.ids for document in many]).astype(np.uint16)
    starts = np.cumsum([0, *(len(document.ids) for document in many)]).astype(np.int64)
    spans = [(a + at, b + at) for document, at in zip(many, starts, strict=False) for a, b in document.names]
    sources = np.array([place % 60 % 4 for place in range(len(many))], dtype=np.uint16)
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "documents": starts,
        "names": np.array(spans, dtype=np.int64),
        "sources": sources,
    }
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "split" / f"{name}.npy").read_bytes()


def test_a_split_without_documents_is_a_split(tmp_path: Path) -> None:
    """No held-out prose is no error where nobody reads it."""
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
    """However it is cut into batches, across epochs too, the sequence is the same; another seed gives another."""
    windows = Windows(whole(split), 8, seed=3)
    everything = windows.batch(np.arange(3 * windows.per_epoch))
    steps = reversed(range(len(everything) // 7))
    by_step = [Windows(whole(split), 8, seed=3).batch(np.arange(7) + step * 7) for step in steps]
    assert np.array_equal(np.concatenate(by_step[::-1]), everything[: len(by_step) * 7])
    assert not np.array_equal(Windows(whole(split), 8, seed=4).batch(np.arange(20)), everything[:20])


def test_a_stream_that_is_too_short_says_what_is_missing(split: Split) -> None:
    """The message holds both figures, so that one knows what to change."""
    with pytest.raises(StageError, match=rf"holds {len(split.tokens)} tokens; windows of 512 need at least 1024"):
        Windows(whole(split), 512, seed=0)


WEIGHTS = [
    {"statements": 1.0},
    {"prose": 1.0},
    {"statements": 0.75, "prose": 0.25},
    {"prose": 0.5, "books": 0.25, "atlas": 0.25},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_mixture_holds_its_shares(split: Split, weights: dict[str, float]) -> None:
    """Every batch has the asked number of windows of each kind, and a step always gives the same batch."""
    mixture = Mixture(split, 8, 8, weights, seed=3)
    kinds = [kind for kind, weight in weights.items() for _ in range(round(8 * weight))]
    tokens = {kind: set(streamed(split.stream(split.select(kind)))) for kind in weights}
    batches = [mixture.batch(step) for step in range(5)]
    for step, rows in enumerate(batches):
        assert rows.shape == (8, 8)
        assert all(set(row.tolist()) <= tokens[kind] for kind, row in zip(kinds, rows, strict=True))
        assert np.array_equal(Mixture(split, 8, 8, weights, seed=3).batch(step), rows)
        for part in (slice(1, None, 3), slice(7, None, 8), slice(9, None)):  # the last holds none
            assert np.array_equal(mixture.batch(step, part), rows[part])
    assert not np.array_equal(batches[0], batches[1])


def test_statements_and_prose_have_the_seeds_that_the_committed_figures_were_made_with(split: Split) -> None:
    """The batches of the default profile stay what they were when there were no other kinds."""
    rows = Mixture(split, 8, 4, HALVES, seed=3).batch(1)
    for half, kind, seed in ((rows[:2], "statements", 4), (rows[2:], "prose", 3)):
        windows = Windows(split.stream(split.select(kind)), 8, seed)
        assert np.array_equal(half, windows.batch(np.arange(2, 4)))


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ({"a": 0.75, "b": 0.25}, 32, {"a": 24, "b": 8}),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, 8, {"a": 4, "b": 2, "c": 2}),
        ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 8, {"a": 3, "b": 3, "c": 2}),
    ],
)
def test_windows_are_shared_out_by_the_largest_remainder(
    weights: dict[str, float], count: int, expected: dict[str, int]
) -> None:
    """No kind is more than one window away from its share, and all windows are given."""
    assert apportion(weights, count) == expected


def test_a_weight_too_small_for_the_batch_is_told() -> None:
    """What would never be read is refused, not left out."""
    with pytest.raises(StageError, match=r"gives b 0\.01 of 8 windows a step, which is less than one"):
        apportion({"a": 0.99, "b": 0.01}, 8)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"statements": 0.5, "prose": 0.4}, "the weights must sum to 1; they sum to 0.9"),
        ({"statements": 1.0, "prose": 0.0}, "each weight is above 0 .*, unlike prose"),
        ({"statements": 1.5, "prose": -0.5}, "each weight is above 0 .*, unlike prose"),
        ({}, "at least 1 item"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weights: dict[str, float], told: str) -> None:
    """A mixture is whole, and names only what is to be read."""
    with pytest.raises(ValidationError, match=told):
        TypeAdapter(Weights).validate_python(weights)


@pytest.mark.parametrize("weights", WEIGHTS[:3], ids=str)
def test_an_epoch_of_batches_reads_as_much_as_the_mixture_allows(split: Split, weights: dict[str, float]) -> None:
    """No text is read twice in an epoch, the shares of the tokens are those asked for, one kind is read whole."""
    batches = Batches(split, 64, 32, weights, seed=3)
    lengths = np.diff(split.documents)
    apart = {kind: {int(n) for n in split.select(kind) if split.names_in[n] != 1} for kind in weights}
    batches.at(0)
    for epoch in range(2):
        size = len(batches.epochs[0]) * epoch
        read = Counter(int(n) for step in range(len(batches.epochs[0])) for n in batches.at(size + step))
        assert set(read.values()) == {1}
        assert set(read) <= set().union(*apart.values())
        assert any(chosen <= set(read) for chosen in apart.values())
        for kind, weight in weights.items():
            share = lengths[list(set(read) & apart[kind])].sum() / lengths[list(read)].sum()
            assert share == pytest.approx(weight, abs=0.1)
        assert len(batches.epochs) == epoch + 1


def test_batches_keep_to_their_budget(split: Split) -> None:
    """Padded size stays within the budget, documents are cut to the longest that is allowed, lengths are alike."""
    batches = Batches(split, 64, 16, HALVES, seed=3)
    widths = []
    for step in range(40):
        ids, mask, _ = batches.read(batches.at(step), FILL)
        assert ids.size <= 64
        assert ids.shape[1] <= 16
        widths.append(mask.sum() / mask.size)
    assert np.mean(widths) > 0.85


def test_batches_are_a_function_of_the_step(split: Split) -> None:
    """A reader that starts in the middle reads what the one from the beginning would have read."""
    first = Batches(split, 64, 32, HALVES, seed=3)
    expected = [first.at(step).tolist() for step in range(50)]
    late = Batches(split, 64, 32, HALVES, seed=3)
    assert [late.at(step).tolist() for step in range(49, -1, -1)][::-1] == expected
    other = Batches(split, 64, 32, HALVES, seed=4)
    assert [other.at(step).tolist() for step in range(50)] != expected


def test_a_batch_is_padded_and_knows_its_names(split: Split) -> None:
    """Ids, mask and names of a batch against the documents themselves; a name that is cut off is left out."""
    batches = Batches(split, 400, 6, HALVES, seed=3)
    chosen = np.arange(12)
    ids, mask, found = batches.read(chosen, FILL)
    for row, document in enumerate(documents(60)[:12]):
        kept = list(document.ids)[:6]
        assert ids[row].tolist() == kept + [FILL] * (ids.shape[1] - len(kept))
        assert mask[row].tolist() == [1] * len(kept) + [0] * (ids.shape[1] - len(kept))
        assert [(a, b) for r, a, b in found if r == row] == document.names
    read = [document for document in documents(60) if len(document.names) != 1]
    assert batches.counted == {
        "documents": len(read),
        "documents_cut": sum(len(document.ids) > 6 for document in read),
        "documents_left_out": 10,
    }
    short = Batches(split, 400, 3, HALVES, seed=3)
    assert {(a, b) for _, a, b in short.read(chosen, FILL)[2]} == {(1, 2), (1, 3)}


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("statements", [], "asks for statements, of which the corpus holds no text"),
        ("prose", [(1, 2)], "asks for prose, of which the corpus holds no text"),
        ("statements", [(1, 2)], "asks for statements, of which no text holds two names or none"),
    ],
)
def test_a_corpus_of_the_wrong_kind_is_told_at_once(
    kind: str, name: list[tuple[int, int]], sentence: str, tmp_path: Path
) -> None:
    """Batches of texts that do not exist are refused, not searched for without end."""
    write_split(tmp_path / "split", [Document(range(1, 9), name)] * 3, 300)
    with pytest.raises(StageError, match=sentence):
        Batches(Split.open(tmp_path / "split"), 64, 32, {kind: 1.0}, seed=0)
