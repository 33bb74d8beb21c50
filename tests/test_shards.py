"""Packed shards and the batches drawn from them: nothing is lost, and a batch is a pure function of the step."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tasks.common.shards import Batches, Document, Mixture, Split, Windows, write_split
from tasks.common.stage import StageError

FILL = 0


def documents(count: int, seed: int = 0) -> list[Document]:
    """Return documents of 4 to 20 tokens, all tokens different; every third has two names, one in six a single one."""
    random = np.random.default_rng(seed)
    result, token = [], 1
    for place in range(count):
        length = int(random.integers(4, 21))
        names = {0: [(1, 2), (2, 4)], 1: [(1, 3)] if place % 2 else []}.get(place % 3, [])
        result.append(Document(list(range(token, token + length)), names))
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


def test_statements_and_prose_part_the_documents(split: Split) -> None:
    """Texts with names and texts without are two streams that hold all texts; every name keeps its tokens."""
    statements, prose = split.select(statements=True), split.select(statements=False)
    assert sorted(texts(statements) + texts(prose)) == texts(split)
    assert texts(statements) == [list(document.ids) for document in documents(60) if document.names]
    assert names(statements) == names(split)
    assert names(prose) == []


def test_a_split_without_documents_is_a_split(tmp_path: Path) -> None:
    """No held-out prose is no error where nobody reads it."""
    assert write_split(tmp_path / "split", [], 300) == {"documents": 0, "tokens": 0, "names": 0}
    empty = Split.open(tmp_path / "split")
    assert texts(empty.select(statements=True)) == texts(empty) == []


def test_windows_cover_an_epoch_once(split: Split) -> None:
    """The windows of an epoch do not overlap and leave out less than two windows' tokens; each epoch differs."""
    windows = Windows(split, 16, seed=3)
    epochs = [windows.batch(epoch * windows.per_epoch, windows.per_epoch) for epoch in range(2)]
    for rows in epochs:
        assert len(np.unique(rows)) == rows.size  # all tokens of the fixture differ
        assert len(split.tokens) - rows.size < 2 * 16
        assert (np.diff(rows, axis=1) == 1).all()
    assert not np.array_equal(epochs[0], epochs[1])


def test_windows_are_a_function_of_the_step(split: Split) -> None:
    """However it is cut into batches, across epochs too, the sequence is the same; another seed gives another."""
    windows = Windows(split, 8, seed=3)
    whole = windows.batch(0, 3 * windows.per_epoch)
    by_step = [Windows(split, 8, seed=3).batch(step * 7, 7) for step in reversed(range(len(whole) // 7))]
    assert np.array_equal(np.concatenate(by_step[::-1]), whole[: len(by_step) * 7])
    assert not np.array_equal(Windows(split, 8, seed=4).batch(0, 20), whole[:20])


def test_a_stream_that_is_too_short_says_what_is_missing(split: Split) -> None:
    """The message holds both figures, so that one knows what to change."""
    with pytest.raises(StageError, match=rf"holds {len(split.tokens)} tokens; windows of 512 need at least 1024"):
        Windows(split, 512, seed=0)


@pytest.mark.parametrize("statements", [0.0, 0.25, 0.75, 1.0])
def test_a_mixture_holds_its_share_of_statements(split: Split, statements: float) -> None:
    """Every batch has the asked number of windows of statements, and a step always gives the same batch."""
    mixture = Mixture(split, 8, 8, statements, seed=3)
    facts = set(split.select(statements=True).tokens.tolist())
    batches = [mixture.batch(step) for step in range(5)]
    for step, rows in enumerate(batches):
        assert rows.shape == (8, 8)
        assert sum(set(row.tolist()) <= facts for row in rows) == round(8 * statements)
        assert np.array_equal(Mixture(split, 8, 8, statements, seed=3).batch(step), rows)
    assert not np.array_equal(batches[0], batches[1])


@pytest.mark.parametrize("statements", [0.0, 0.5, 1.0])
def test_an_epoch_of_batches_reads_every_text_once(split: Split, statements: float) -> None:
    """Two-name statements are read once an epoch, prose as often as its share asks for and never twice."""
    batches = Batches(split, 64, 32, statements, seed=3)
    counts = np.bincount(np.searchsorted(split.documents, split.names[:, 0], side="right") - 1, minlength=60)
    lengths = np.diff(split.documents)
    batches.at(0)
    for epoch in range(2):
        size = len(batches.epochs[0]) * epoch
        read = Counter(int(n) for step in range(len(batches.epochs[0])) for n in batches.at(size + step))
        assert set(read.values()) == {1}
        facts = {n for n in read if counts[n]}
        assert facts == ({n for n in range(60) if counts[n] == 2} if statements else set())
        share = lengths[list(facts)].sum() / lengths[list(read)].sum() if facts else 0
        assert share == pytest.approx(statements, abs=0.1)
        assert len(batches.epochs) == epoch + 1


def test_batches_keep_to_their_budget(split: Split) -> None:
    """Padded size stays within the budget, documents are cut to the longest that is allowed, lengths are alike."""
    batches = Batches(split, 64, 16, 0.5, seed=3)
    widths = []
    for step in range(40):
        ids, mask, _ = batches.read(batches.at(step), FILL)
        assert ids.size <= 64
        assert ids.shape[1] <= 16
        widths.append(mask.sum() / mask.size)
    assert np.mean(widths) > 0.85


def test_batches_are_a_function_of_the_step(split: Split) -> None:
    """A reader that starts in the middle reads what the one from the beginning would have read."""
    first = Batches(split, 64, 32, 0.5, seed=3)
    expected = [first.at(step).tolist() for step in range(50)]
    late = Batches(split, 64, 32, 0.5, seed=3)
    assert [late.at(step).tolist() for step in range(49, -1, -1)][::-1] == expected
    other = Batches(split, 64, 32, 0.5, seed=4)
    assert [other.at(step).tolist() for step in range(50)] != expected


def test_a_batch_is_padded_and_knows_its_names(split: Split) -> None:
    """Ids, mask and names of a batch against the documents themselves; a name that is cut off is left out."""
    batches = Batches(split, 400, 6, 0.5, seed=3)
    chosen = np.arange(12)
    ids, mask, found = batches.read(chosen, FILL)
    for row, document in enumerate(documents(60)[:12]):
        kept = list(document.ids)[:6]
        assert ids[row].tolist() == kept + [FILL] * (ids.shape[1] - len(kept))
        assert mask[row].tolist() == [1] * len(kept) + [0] * (ids.shape[1] - len(kept))
        assert [(a, b) for r, a, b in found if r == row] == document.names
    short = Batches(split, 400, 3, 0.5, seed=3)
    assert {(a, b) for _, a, b in short.read(chosen, FILL)[2]} == {(1, 2), (1, 3)}


@pytest.mark.parametrize(
    ("statements", "name", "sentence"),
    [(0.5, [], "no text of the corpus holds two names"), (0.0, [(1, 2)], "no text of the corpus is free of names")],
)
def test_a_corpus_of_the_wrong_kind_is_told_at_once(
    statements: float, name: list[tuple[int, int]], sentence: str, tmp_path: Path
) -> None:
    """Batches of texts that do not exist are refused, not searched for without end."""
    write_split(tmp_path / "split", [Document(range(1, 9), name)] * 3, 300)
    with pytest.raises(StageError, match=sentence):
        Batches(Split.open(tmp_path / "split"), 64, 32, statements, seed=0)
