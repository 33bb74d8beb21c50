"""Sorting on disk gives the same order as sorting in memory, for any memory limit."""

from pathlib import Path

import pyarrow as pa
import pytest

from tasks.common import stable_hash
from tasks.ingest import sorting
from tasks.ingest.sorting import Sorter

SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])


def rows(count: int) -> list[dict[str, str]]:
    """Return rows of which every third has the id of an earlier one."""
    names = [number // 3 if number % 3 == 2 else number for number in range(count)]
    return [{"id": stable_hash.short_id(str(name)), "text": f"row {number}"} for number, name in enumerate(names)]


@pytest.mark.parametrize("spill", [60, 10**9])
@pytest.mark.parametrize("bucket", [120, 10**9])
def test_rows_are_sorted_by_id_rank_and_order_of_addition(
    spill: int, bucket: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is the same for any limit, down to a few rows and the last digits of an id."""
    monkeypatch.setattr(sorting, "SPILL_BYTES", spill)
    monkeypatch.setattr(sorting, "BUCKET_BYTES", bucket)
    added = rows(30)
    ranks = [number % 2 for number in range(len(added))]
    sorter = Sorter(tmp_path / "spilled", SCHEMA)
    for row, rank in zip(added, ranks, strict=True):
        sorter.add(row, len(row["text"]), rank)
    ordered = [(row["id"], row["text"], rank) for part in sorter
             for row, rank in zip(part.to_pylist(), sorter.ranks(part), strict=True)]  # fmt: skip
    expected = sorted(range(len(added)), key=lambda number: (added[number]["id"], ranks[number], number))
    assert ordered == [(added[number]["id"], added[number]["text"], ranks[number]) for number in expected]


def test_rows_of_one_id_are_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise duplicates would not be found."""
    monkeypatch.setattr(sorting, "SPILL_BYTES", 100)
    monkeypatch.setattr(sorting, "BUCKET_BYTES", 60)
    sorter = Sorter(tmp_path / "spilled", SCHEMA)
    for row in rows(18):
        sorter.add(row, 10)
    parts = [set(part["id"].to_pylist()) for part in sorter]
    assert len(parts) == len({row["id"] for row in rows(18)})
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_empty_sorter_yields_no_rows(tmp_path: Path) -> None:
    assert list(Sorter(tmp_path / "spilled", SCHEMA)) == []
