"""Tables on disk: equal rows give equal bytes for any batches, and reading in batches equals reading at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.common import tables
from tasks.common.identity import tree_hash


def rows(count: int) -> list[dict[str, Any]]:
    """Return rows of a corpus, one in seven held out."""
    return [
        {"id": f"{number:016x}", "text": f"text {number} " * (number % 9), "names": ["a"] * (number % 3),
         "source": "test", "group": None, "licence": "MIT", "split": "train" if number % 7 else "heldout"}
        for number in range(count)
    ]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make shards and row groups hold only a few rows."""
    monkeypatch.setattr(tables, "ROWS_PER_SHARD", 40)
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 10)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("count", [0, 1, 10, 39, 40, 95])
@pytest.mark.parametrize("portion", [1, 7, 10, 1000])
def test_writer_bytes_do_not_depend_on_batches(count: int, portion: int, tmp_path: Path) -> None:
    """Row by row or all at once, as dicts or as Arrow tables, the shards have the same bytes."""
    schema, all_rows = tables.schema("corpus"), rows(count)
    assert tables.write(all_rows, tmp_path / "whole", schema) == count
    with tables.Writer(tmp_path / "portions", schema) as writer:
        for start in range(0, count, portion):
            batch = all_rows[start : start + portion]
            writer.write(batch if start % 2 else pa.Table.from_pylist(batch, schema))
    assert writer.rows == count
    assert tree_hash(tmp_path / "portions") == tree_hash(tmp_path / "whole")
    assert tables.read(tmp_path / "portions").to_pylist() == all_rows
    files = sorted((tmp_path / "whole").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == (
        [40] * (count // 40) + [count % 40] * (count % 40 > 0) or [0]
    )


@pytest.mark.usefixtures("small")
def test_batches_join_to_the_table(tmp_path: Path) -> None:
    """Batches hold the rows of `read` in order, at most one row group each, with and without a split."""
    tables.write(rows(95), tmp_path / "table", tables.schema("corpus"))
    for split in (None, "heldout"):
        parts = list(tables.batches(tmp_path / "table", split))
        assert pa.concat_tables(parts).to_pylist() == tables.read(tmp_path / "table", split).to_pylist()
        assert max(part.num_rows for part in parts) <= 10
    chosen = next(tables.batches(tmp_path / "table", columns=["text", "split"]))
    assert chosen.column_names == ["text", "split"]
    assert tables.count(tmp_path / "table") == 95


def test_writer_propagates_errors(tmp_path: Path) -> None:
    """An error of the rows' iterator leaves the writer unchanged."""

    def broken() -> Iterator[dict[str, Any]]:
        yield from rows(3)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        tables.write(broken(), tmp_path / "table", tables.schema("corpus"))
