"""Sorting on disk gives what sorting in memory gives, whatever fits into memory."""

from pathlib import Path

import pyarrow as pa
import pytest

from tasks.common import draw
from tasks.common.sources import sorting
from tasks.common.sources.sorting import Sorter

SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])


def rows(count: int) -> list[dict[str, str]]:
    """Return rows of which every third has the id of an earlier one."""
    names = [number // 3 if number % 3 == 2 else number for number in range(count)]
    return [{"id": draw.short_id(str(name)), "text": f"row {number}"} for number, name in enumerate(names)]


@pytest.mark.parametrize("spill", [60, 10**9])
@pytest.mark.parametrize("bucket", [120, 10**9])
def test_rows_leave_sorted_by_id_rank_and_arrival(
    spill: int, bucket: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little may be held, down to a few rows and to the last digits of an id, the order is the same."""
    monkeypatch.setattr(sorting, "SPILL_BYTES", spill)
    monkeypatch.setattr(sorting, "BUCKET_BYTES", bucket)
    given = rows(30)
    ranks = [number % 2 for number in range(len(given))]
    sorter = Sorter(tmp_path / "spilled", SCHEMA)
    for row, rank in zip(given, ranks, strict=True):
        sorter.add(row, len(row["text"]), rank)
    found = [(row["id"], row["text"], rank) for part in sorter
             for row, rank in zip(part.to_pylist(), sorter.ranks(part), strict=True)]  # fmt: skip
    expected = sorted(range(len(given)), key=lambda place: (given[place]["id"], ranks[place], place))
    assert found == [(given[place]["id"], given[place]["text"], ranks[place]) for place in expected]


def test_one_id_stays_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one id meet in one table however small the parts are, or duplicates would pass."""
    monkeypatch.setattr(sorting, "SPILL_BYTES", 100)
    monkeypatch.setattr(sorting, "BUCKET_BYTES", 60)
    sorter = Sorter(tmp_path / "spilled", SCHEMA)
    for row in rows(18):
        sorter.add(row, 10)
    parts = [set(part["id"].to_pylist()) for part in sorter]
    assert len(parts) == len({row["id"] for row in rows(18)})
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_no_rows_are_no_parts(tmp_path: Path) -> None:
    """An empty sorter yields nothing."""
    assert list(Sorter(tmp_path / "spilled", SCHEMA)) == []
