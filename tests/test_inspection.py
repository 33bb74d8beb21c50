"""What `inspect` says about files before they are sources."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.ingest import inspection
from tasks.ingest.inspection import inspect
from tasks.ingest.row_loading import RowOptions
from tests.conftest import ROOT

ROWS: list[dict[str, Any]] = [
    {"question": f"What is {number}?", "answer": f"It is {number:03}."} for number in range(400)
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_file_of_questions_is_described(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_bytes(lines([*ROWS, {"question": "Why?", "answer": ""}]))
    found = inspect(path)
    assert (found.table, found.formats, found.columns) == (
        "instructions",
        {"alpaca (jsonl)": 1},
        ("question", "answer"),
    )
    assert found.mapped == {"instruction": "question", "output": "answer"}
    assert (found.rows_read, found.rows_rejected, found.estimated_rows, found.files) == (401, 1, 401, 1)
    assert found.max_characters == len("What is 100?\nIt is 100.")
    assert found.first_rows[0]["messages"][1] == {"role": "assistant", "content": "It is 000."}
    assert found.problems == ("qa.jsonl, line 401: an empty answer",)
    assert found.size == path.stat().st_size


@pytest.mark.parametrize(("packing", "tolerance"), [("", 0.1), (".gz", 0.4)])
def test_rows_of_a_larger_file_are_estimated(tmp_path: Path, packing: str, tolerance: float) -> None:
    """What is read ahead counts as read, which matters more in a packed file."""
    draw = random.Random(1)
    content = lines([{"question": str(draw.random()), "answer": str(draw.random())} for _ in range(40_000)])
    path = tmp_path / f"qa.jsonl{packing}"
    path.write_bytes(gzip.compress(content) if packing else content)
    found = inspect(path, max_rows=10_000)
    assert found.rows_read == 10_000
    assert found.estimated_rows == pytest.approx(40_000, rel=tolerance)


def test_rows_of_a_parquet_file_are_counted(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "qa.parquet")
    found = inspect(tmp_path / "qa.parquet", max_rows=10)
    assert (found.rows_read, found.estimated_rows) == (10, 400)


def test_a_folder_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MAX_FILES", 10)
    for number in range(40):
        (tmp_path / f"{number}.md").write_text(f"Document {number:02}.", encoding="utf-8")
    found = inspect(tmp_path)
    assert (found.files, found.rows_read, found.estimated_rows, found.formats) == (40, 10, 40, {"md": 10})
    assert found.table == "corpus"


def test_problems_are_said_and_nothing_is_raised(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/a.csv").write_text("id,turns\n1,x\n", encoding="utf-8")
    (tmp_path / "pages/b.png").write_bytes(b"\x89PNG")
    found = inspect(tmp_path / "pages")
    assert found.table is None
    assert found.columns == ("id", "turns")
    assert [problem.partition(":")[0] for problem in found.problems] == ["a.csv", "b.png"]
    assert "found none" in inspect(tmp_path / "absent.txt").problems[0]
    assert inspect(tmp_path / "pages/*.png").files == 1


def test_options_decide_how_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines([{"topic": "tea", "chosen": "Yes.", "rejected": "No."}]))
    assert inspect(path).table is None
    options = RowOptions(table="rankings", columns={"prompt": "Is {topic} good?"})
    assert inspect(path, options).first_rows[0]["prompt"] == [{"role": "user", "content": "Is tea good?"}]


def test_inspecting_loads_no_heavy_library(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_bytes(lines(ROWS))
    code = (
        "import sys; from pathlib import Path; from tasks.ingest.inspection import inspect; "
        f"assert inspect(Path({str(path)!r})).rows_read == 400; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pandas', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
