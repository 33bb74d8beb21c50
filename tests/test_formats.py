"""File formats: every row of a file is used or rejected with its reason, to the last byte, in every format."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.ingest import delimited, formats, json_values, source_files
from tasks.ingest.reading import Reading
from tasks.ingest.row_loading import RowOptions, load_file
from tasks.ingest.source_files import SourceFile, UnreadableFile

PIECES = [
    "word", "two words", '"quoted"', "semi;colon", "com,ma", "tab\tstop", "new\nline", "it's", "naïve", "{", "]", "\\",
]  # fmt: skip
UNICODE_PIECES = ["日本語", "\u2028", "émoji 🙂", "русский"]
BAD_VALUES: list[Any] = [None, 5, ["a"], {"b": 1}]


def make_rows(seed: int, *, western: bool = False) -> list[dict[str, Any]]:
    """Return rows of the table corpus, about every fifth without a text."""
    draw = random.Random(seed)
    pieces = PIECES if western else PIECES + UNICODE_PIECES
    rows = [
        {"text": f"{number} " + " ".join(draw.choices(pieces, k=draw.randrange(1, 30))), "more": number}
        for number in range(draw.randrange(3, 60))
    ]
    return [{**row, "text": draw.choice(BAD_VALUES)} if draw.random() < 0.2 else row for row in rows] + [rows[0]]


def as_cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as a table can contain them: a text or null in each cell."""
    return [{**row, "text": row["text"] if isinstance(row["text"], str) else None} for row in rows]


def write_csv(rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerow(["text", "more"])
    for row in rows:
        writer.writerow([row["text"], row["more"]] if isinstance(row["text"], str) else [])
    return out.getvalue().encode(encoding)


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(as_cells(rows)), sink, row_group_size=7)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def write_arrow(rows: list[dict[str, Any]], make: Callable[..., Any]) -> bytes:
    sink, content = pa.BufferOutputStream(), pa.Table.from_pylist(as_cells(rows))
    with make(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=7)
    made: bytes = sink.getvalue().to_pybytes()
    return made


def arrays(rows: list[dict[str, Any]], **style: Any) -> bytes:
    """Return the rows in two arrays and as values after them."""
    third = len(rows) // 3
    parts = [rows[:third], rows[third : 2 * third], *rows[2 * third :]]
    return "\n".join(json.dumps(part, **style) for part in parts).encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "unicode.jsonl": lambda rows: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8-sig"),
    "utf16.jsonl": lambda rows: "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-16"),
    "lines.json": lambda rows: "".join(json.dumps(row) + "\n\n" for row in rows).encode(),
    "array.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "objects.json": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "arrays.json": arrays,
    "wrapper.json": lambda rows: json.dumps({"version": 1, "none": [], "data": rows}, indent=1).encode(),
    "texts.json": lambda rows: json.dumps([row if row["text"] in BAD_VALUES else row["text"] for row in rows]).encode(),
    "rows.data": lambda rows: json.dumps(rows).encode(),
    "rows.parquet": write_parquet,
    "rows.arrow": lambda rows: write_arrow(rows, pa.ipc.new_file),
    "stream.arrow": lambda rows: write_arrow(rows, pa.ipc.new_stream),
}  # fmt: skip
CSV_WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "comma.csv": write_csv,
    "excel.csv": lambda rows: write_csv(rows, ";", "utf-8-sig"),
    "tab.tsv": lambda rows: write_csv(rows, "\t", "utf-16"),
    "sep.csv": lambda rows: b"sep=|\r\n" + write_csv(rows, "|"),
    "latin.csv": lambda rows: write_csv(rows, ";", "windows-1252"),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content[:50], mtime=0) + gzip.compress(content[50:], mtime=0),
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def load(path: Path, **options: Any) -> tuple[Reading, SourceFile, str]:
    reading, file = Reading("mine", "MIT"), SourceFile(path, path.name)
    return reading, file, load_file(file, RowOptions(**options), reading)


def texts_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"].strip() for row in rows if isinstance(row["text"], str)]


def check(reading: Reading, rows: list[dict[str, Any]]) -> None:
    assert reading.prose == texts_of(rows)
    assert reading.rows_read == len(rows)
    assert reading.rejections == len(rows) - len(texts_of(rows))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_row_is_used_or_rejected(tmp_path: Path, name: str, packing: str, seed: int) -> None:
    rows, path = make_rows(seed), tmp_path / f"{name}{packing}"
    path.write_bytes(PACKERS[packing](WRITERS[name](rows)))
    if packing and path.suffixes[0] in (".parquet", ".arrow"):
        with pytest.raises(UnreadableFile, match="packed once more; unpack it, because it is compressed already"):
            load(path)
        return
    check(load(path)[0], rows)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", CSV_WRITERS)
def test_every_row_of_a_csv_file_is_used(tmp_path: Path, name: str, packing: str, seed: int) -> None:
    """Every row of it has a text; blank lines are no rows."""
    rows, path = make_rows(seed, western=True), tmp_path / f"{name}{packing}"
    path.write_bytes(PACKERS[packing](CSV_WRITERS[name](rows)))
    reading, file, _ = load(path)
    check(reading, [row for row in rows if isinstance(row["text"], str)])
    assert bool(file.notes) == (name == "latin.csv")


@pytest.mark.parametrize("buffer_characters", [3, 64, 4096])
@pytest.mark.parametrize("name", ["pretty.json", "objects.json", "arrays.json", "wrapper.json"])
def test_values_do_not_depend_on_the_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, buffer_characters: int
) -> None:
    monkeypatch.setattr(json_values, "BUFFER_CHARACTERS", buffer_characters)
    rows, path = make_rows(1), tmp_path / name
    path.write_bytes(WRITERS[name](rows))
    check(load(path)[0], rows)


TRUNCATED = [
    *((name, packing) for name in WRITERS for packing in PACKERS if not (packing and "ar" in name)),
    ("comma.csv", ""), ("excel.csv", ".gz"), ("tab.tsv", ""),
]  # fmt: skip


def load_truncated(path: Path, reading: Reading) -> bool:
    """Return whether the file is an error, which must name it."""
    try:
        return bool(load_file(SourceFile(path, path.name), RowOptions(table="corpus"), reading))
    except UnreadableFile as error:
        return path.name in str(error)


@pytest.mark.parametrize(("name", "packing"), TRUNCATED)
def test_a_truncated_file_is_an_error_or_a_rejected_row(tmp_path: Path, name: str, packing: str) -> None:
    """Rows before the end are as in the whole file. What is left of the row at the end is never used."""
    rows = make_rows(3, western=name in CSV_WRITERS)
    content = PACKERS[packing]({**WRITERS, **CSV_WRITERS}[name](rows))
    draw = random.Random(7)
    for _ in range(25):
        path = tmp_path / f"{name}{packing}"
        path.write_bytes(content[: draw.randrange(1, len(content) - 2)])
        reading = Reading("mine", "MIT")
        failed = load_truncated(path, reading)
        used = reading.rows_read - reading.rejections
        whole = texts_of(rows)
        assert reading.prose == whole[:used]
        ends_at_a_line = name.endswith((".jsonl", "lines.json", ".csv", ".tsv"))  # no one can tell that more is missing
        assert failed or reading.rejections or used == len(whole) or ends_at_a_line


def test_a_damaged_gzip_file_names_file_and_place(tmp_path: Path) -> None:
    draw = random.Random(1)
    content = "\n".join(json.dumps({"text": f"text {number} {draw.random()}"}) for number in range(9000)).encode()
    damaged = bytearray(gzip.compress(content, mtime=0))
    damaged[len(damaged) // 2] ^= 0xFF
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(damaged)
    with pytest.raises(UnreadableFile, match=r"mine\.jsonl\.gz could not be read (at its beginning|after line \d+): "):
        load(path)


def test_a_long_cell_is_a_row_like_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(f"text\nshort\n{'x' * 200_000}\nlast\n", encoding="utf-8")
    assert [len(text) for text in load(path)[0].prose] == [5, 200_000, 4]  # type: ignore[attr-defined]


def test_a_last_row_without_its_end_is_rejected(tmp_path: Path) -> None:
    """A row with fewer cells than columns is complete only if its line ends."""
    path = tmp_path / "mine.csv"
    path.write_text("text,more\nfirst\nsecond,1\nthi", encoding="utf-8")
    reading, _, _ = load(path)
    assert reading.prose == ["first", "second"]
    assert reading.first_reason == "mine.csv, line 4: the file ends within this row, which has 1 of 2 cells"


def test_a_cell_longer_than_any_text_stops_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "MAX_CELL_CHARACTERS", 1000)
    path = tmp_path / "mine.csv"
    path.write_text(f"text\nshort\n{'x' * 2000}\n", encoding="utf-8")
    with pytest.raises(
        UnreadableFile, match=r"expected CSV in mine\.csv, .* after line 2: field larger than field limit"
    ):
        load(path)


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("Größe und Maß für dich", "windows-1252"),
        ("L'été « CAFÉ » — déjà vu…", "windows-1252"),
        ("Привет, мир! Как дела?", None),
        ("これはテストです。", None),
        ("这是一个测试文件。", None),
    ],
)
def test_text_that_is_not_utf8_is_western_or_unknown(content: str, encoding: str | None) -> None:
    original = encoding or {"П": "koi8-r", "こ": "shift_jis", "这": "gbk"}[content[0]]
    chunks = [content.encode(original)]
    assert source_files.find_encoding(lambda: chunks) == encoding


def test_damaged_utf8_is_not_western() -> None:
    assert source_files.find_encoding(lambda: ["naïve größe für ".encode() + b"\xff" + "dich ü".encode()]) is None


def test_an_encoding_of_the_settings_is_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("Привет, мир!".encode("koi8-r"))
    reading = Reading("mine", "MIT")
    load_file(SourceFile(path, "mine.txt", "koi8-r"), RowOptions(), reading)
    assert reading.prose == ["Привет, мир!"]
    with pytest.raises(UnreadableFile, match=r"found the byte 0xf0 in line 1; save it as UTF-8, or set `encoding`"):
        load(path)


def test_a_bad_line_of_damaged_json_lines_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes('{"text": "é ü"}\n{"text": "'.encode() + b'\xff"}\n{"text": "last"}\n')
    reading, _, _ = load(path)
    assert reading.prose == ["é ü", "last"]
    assert isinstance(reading.rejected, list)
    [rejection] = reading.rejected
    assert rejection.reason.startswith("mine.jsonl, line 2: not JSON ('utf-8' codec can't decode byte 0xff")
    assert rejection.row == '{"text": "\\xff"}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": [{"text": "x"}], "b": [{"text": "y"}]}, "line 1: the lists a, b may be the rows; name one of them with"),
        ({"text": "one row", "parts": [{"text": "x"}]}, ["one row"]),
        ({"data": {"items": [{"text": "x"}, {"text": "y"}]}}, "the columns data are no known form of rows of a table"),
        ([], "mine.json: expected rows with columns, found none; add rows, or remove it"),
        ([[{"role": "user"}]], "found none; item 1: expected an object with columns, found list"),
    ],
)
def test_a_wrapper_has_one_list_of_objects(tmp_path: Path, content: Any, expected: str | list[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    if isinstance(expected, list):
        assert load(path)[0].prose == expected
    else:
        with pytest.raises(UnreadableFile, match=expected):
            load(path)


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_records_names_the_list_of_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = json.dumps({"data": {"items": [{"text": "x"}, {"text": "y"}, 5]}, "more": [{"text": "z"}]})
    path.write_text(content + "\n" + content, encoding="utf-8")
    reading, _, _ = load(path, records="data.items")
    assert reading.prose == ["x", "y", "x", "y"]
    assert reading.rejections == 2


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"text", "txt"), ("a.MD", b"# title", "md"), ("a", b"plain", "txt"), ("a.py", b"x = 1", "txt"),
        ("a", b"<!DOCTYPE html><p>x", "html"), ("a.csv", b"<html><p>x", "html"), ("a.csv", b"a,b\n", "csv"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "jsonl"), ("a.json", b'{"a": 1}', "json"),
        ("a.jsonl", b'{"a": 1}', "jsonl"),
        ("a.jsonl", b"{\n\"a\": 1}", "json"), ("a.jsonl", b"[{}]", "json"), ("a.jsonl", b'{"a": broken}\n{}', "jsonl"),
        ("a", b'\xef\xbb\xbf\n {"a": 1}\n{}', "jsonl"), ("a.txt.gz", gzip.compress(b"text", mtime=0), "txt"),
        ("a.jsonl", b"%PDF-1.7 x", "pdf"),
        ("a.txt", b'{"a": 1}\n{"a": 2}\n', "jsonl"), ("a.txt", b"{a}\n", "txt"),
        ("a.bin", b"ARROW1\0\0", "arrow"), ("a.txt", "x".encode("utf-16"), "txt"),
    ],
)  # fmt: skip
def test_a_format_is_found_by_first_bytes_and_suffix(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert formats.detect(SourceFile(path, name)) == expected


def test_the_query_of_an_address_is_not_part_of_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "cached"
    path.write_text("text,more\nHello,1\n", encoding="utf-8")
    assert formats.detect(SourceFile(path, "https://example.org/a.b/rows.CSV.gz?download=1.txt")) == "csv"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.parquet", b"text", "expected a parquet file by its name, found text; correct its name"),
        ("a.xml", b"<?xml version='1.0'?><a/>", "an XML file; save its text as text, HTML or JSON"),
        ("a.db", b"SQLite format 3\0", "an SQLite database; read it with a source of `kind: sql`"),
        ("a.docx", b"PK\x03\x04", "a zip file or a document of Word"),
        ("a.png", b"\x89PNG\r\n", "an image; only text can be read"),
        ("a.txt", b"a\0b", "binary data of an unknown kind"),
        ("a.gz", gzip.compress(gzip.compress(b"text")), "a file that is packed twice; unpack it once"),
        ("a.gz", gzip.compress(b"text")[:12], "could not be read at its beginning: Compressed file ended before"),
        ("a.txt", b" \n", "an empty file"),
    ],
)
def test_a_file_of_the_wrong_kind_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match=f"^{name}.*{expected}"):
        formats.detect(SourceFile(path, name))
