"""Folders and globs of documents: one document for each file, in the order of their paths."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.common.harness.job import StageError
from tasks.ingest import file_lists, source_reading
from tests.data_fixtures import copy_sources, ingest_into, manifest, rejections, table

PAGE = """<!DOCTYPE html><html><head><meta charset="{charset}"><title>Tea</title></head><body>
<nav><a href="/">Home</a> <a href="/shop">Shop</a></nav>
<main><h1>Green tea</h1><p>Green tea is made from leaves that are not oxidized. Its taste is frais et léger.</p>
<p>Water of 70 degrees is best for it, because boiling water makes it bitter.</p></main>
<footer>Copyright, imprint, privacy</footer></body></html>"""
NO_FACTS: dict[str, Any] = {"wordings": None, "names": None, "relations": []}
DOCS = {"name": "pages", "kind": "files", "path": "pages"}


def make_pdf(pages: list[str], password: str | None = None) -> bytes:
    """Return a PDF with a line of text on each page."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(300, 300)
        font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        fonts = DictionaryObject(
            {NameObject("/F1"): DictionaryObject({NameObject(k): NameObject(v) for k, v in font.items()})}
        )
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(content)
    if password:
        writer.encrypt(password)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


CHAT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
FILES: dict[str, bytes] = {
    "pages/a.txt": b"First paragraph.\r\n\r\nSecond paragraph.\n",
    "pages/b/notes.md": b"# Notes\n\nSome *text*.\n",
    "pages/b/page.html": PAGE.format(charset="utf-8").encode(),
    "pages/b/old.html": PAGE.format(charset="iso-8859-1").replace("Green", "White").encode("iso-8859-1"),
    "pages/b/paper.pdf": make_pdf(["The first page.", "The second page."]),
    "pages/chats.jsonl": json.dumps({"conversations": CHAT}).encode(),
    "pages/more.csv": "text;year\nEin schöner Tag.;1999\n".encode("windows-1252"),
    "pages/pairs.json": json.dumps([{"prompt": "Hi", "chosen": "Hello!", "rejected": ""}]).encode(),
    "pages/.hidden/c.txt": b"Hidden.",
    "pages/.DS_Store": b"\0\0",
    "pages/z/empty.txt": b"",
    "pages/z/image.png": b"\x89PNG\r\n\x1a\n\0",
    "pages/z/locked.pdf": make_pdf(["Secret."], "password"),
    "pages/z/report.docx": b"PK\x03\x04\0\0",
    "pages/z/scan.pdf": make_pdf([""]),
    "pages/z/table.csv": b"year,rain\n1999,5\n",
    "pages/z/torn.pdf": make_pdf(["Torn."])[:100],
}  # fmt: skip
REASONS = {
    "pages/z/empty.txt": "an empty file",
    "pages/z/image.png": "an image; only text can be read",
    "pages/z/locked.pdf": "an encrypted PDF; save it without its password",
    "pages/z/report.docx": "a zip file or a document of Word, Excel or PowerPoint; unpack it, or save it as text",
    "pages/z/scan.pdf": "a PDF without text; scanned pages need text recognition (OCR) first",
    "pages/z/table.csv": "the columns year, rain are no known form of rows of a table; say with `table` what the rows",
    "pages/z/torn.pdf": "a damaged PDF (",
}


def test_a_word_of_a_pdf_is_joined_over_the_line_end_and_signs_without_a_character_are_left_out(tmp_path: Path) -> None:
    lines = "all pack-) Tj 0 -14 Td (ages \\024of it) Tj 0 -14 Td (are here."  # \024: a bracket of a formula's font
    copied = copy_files(tmp_path, {"pages/a.pdf": make_pdf([lines])})
    folder = ingest_into(tmp_path / "out", copied, **NO_FACTS, sources=[DOCS])
    assert [row["text"] for row in table(folder, "corpus")] == ["all packages  of it\nare here."]


def copy_files(folder: Path, files: dict[str, bytes]) -> Path:
    copied = copy_sources(folder)
    for name, content in files.items():
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(content)
    return copied


def test_a_mixed_folder_is_read_into_the_tables_and_the_rest_is_rejected(tmp_path: Path) -> None:
    folder = ingest_into(tmp_path / "out", copy_files(tmp_path, FILES), **NO_FACTS, sources=[DOCS])
    texts = {row["text"] for row in table(folder, "corpus")}
    green = next(text for text in texts if "Green tea is made" in text)
    assert "frais et léger" in green
    assert not any("Shop" in text or "imprint" in text for text in texts)
    assert any("White tea" in text and "frais et léger" in text for text in texts)
    assert {"First paragraph.\n\nSecond paragraph.", "# Notes\n\nSome *text*."} <= texts
    assert {"The first page.\n\nThe second page.", "Ein schöner Tag."} <= texts
    assert [row["messages"][-1]["content"] for row in table(folder, "instructions")] == ["Hello!"]
    assert [row["responses"] for row in table(folder, "rankings")] == [["Hello!", ""]]
    entry = manifest(folder)["pages"]
    assert (entry["read"], entry["used"], entry["rejected"]) == (15, 8, 7)
    assert entry["formats"] == {
        "csv": 1,
        "html": 2,
        "md": 1,
        "pdf": 1,
        "preference (json)": 1,
        "sharegpt (jsonl)": 1,
        "txt": 1,
    }
    assert entry["licence"] == "unknown"
    found = {row["row"]: row["reason"] for row in rejections(folder)}
    assert found.keys() == REASONS.keys()
    assert all(found[name].startswith(f"{name}: {reason}") for name, reason in REASONS.items())
    assert "pages/more.csv: not UTF-8, read as windows-1252; set `encoding` if that is wrong" in entry["notes"]


def test_files_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    copied = copy_files(tmp_path, FILES)
    names, is_one = file_lists.find(copied, "pages/**/*.html")
    assert (names, is_one) == (["pages/b/old.html", "pages/b/page.html"], False)
    assert file_lists.find(copied, "pages/**") == file_lists.find(copied, "pages")
    assert file_lists.find(copied, "pages/a.txt") == (["pages/a.txt"], True)
    assert file_lists.find(copied, "pages")[0] == sorted(name for name in FILES if "/." not in name)
    assert file_lists.find(copied, "pages/*")[0] == [
        "pages/a.txt",
        "pages/chats.jsonl",
        "pages/more.csv",
        "pages/pairs.json",
    ]
    assert file_lists.find(copied, "pages/.hidden/*")[0] == ["pages/.hidden/c.txt"]


@pytest.mark.parametrize(
    ("path", "by", "texts"),
    [
        ("pages/a.txt", None, ["First paragraph.", "Second paragraph."]),
        ("pages/a.txt", "document", ["First paragraph.\n\nSecond paragraph."]),
        ("pages/*.txt", None, ["First paragraph.\n\nSecond paragraph."]),
        ("pages/*.txt", "paragraph", ["First paragraph.", "Second paragraph."]),
        ("pages/b/*.pdf", "paragraph", ["The first page.", "The second page."]),
        ("pages/b/*.pdf", None, ["The first page.\n\nThe second page."]),
    ],
)
def test_a_file_is_a_document_or_its_paragraphs(tmp_path: Path, path: str, by: str | None, texts: list[str]) -> None:
    copied = copy_files(tmp_path, FILES)
    folder = ingest_into(tmp_path / "out", copied, **NO_FACTS, sources=[{**DOCS, "path": path, "by": by}])
    assert sorted(row["text"] for row in table(folder, "corpus")) == texts


def test_a_template_may_use_the_name_of_the_file(tmp_path: Path) -> None:
    copied = copy_files(tmp_path, {"pages/a.txt": b"Text.", "pages/b.txt": b"More."})
    source = {**DOCS, "columns": {"text": "{file}\n{text}"}}
    folder = ingest_into(tmp_path / "out", copied, **NO_FACTS, sources=[source])
    assert sorted(row["text"] for row in table(folder, "corpus")) == ["pages/a.txt\nText.", "pages/b.txt\nMore."]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "source pages: expected a file at .*pages, a folder with files or a pattern of files, found none"),
        (
            {"pages/a.png": b"\x89PNG", "pages/b.png": b"\x89PNG"},
            "source pages: pages/a.png: an image; only text can be read",
        ),
        (
            {"pages/a.jsonl": b'{"text": 5}', "pages/b.jsonl": b'{"text": ["x"]}'},
            "none of the 2 files at pages has a row that can be used; the first: pages/a.jsonl, line 1: text must be",
        ),
        (
            {"pages/a.txt": b"Text.", "pages/b.json": b'[{"text": "a"}, {"text"'},
            "source pages: expected JSON in pages/b.json, found something else after item 1, in line 1: ",
        ),
        (
            {"pages/a.txt": b"Text.", "pages/b.csv": b'text\na\n"b'},
            "expected CSV in pages/b.csv, .* after line 2: a quoted",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_to_its_end_stops_the_run(
    tmp_path: Path, files: dict[str, bytes], expected: str
) -> None:
    with pytest.raises(StageError, match=expected):
        ingest_into(tmp_path / "out", copy_files(tmp_path, files), sources=[DOCS])


def test_a_large_folder_has_one_hash_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_reading, "MAX_LISTED_FILES", 2)

    def read(name: str, content: bytes) -> dict[str, Any]:
        scratch = tmp_path / f"{Path(name).stem}{len(content)}"
        copied = copy_files(scratch, {"pages/1.txt": b"One.", "pages/2.txt": b"Two.", name: content})
        folder = ingest_into(scratch / "out", copied, **NO_FACTS, sources=[DOCS])
        return manifest(folder)["pages"]

    first, other, renamed = (
        read("pages/3.txt", b"Three."),
        read("pages/3.txt", b"Four."),
        read("pages/4.txt", b"Three."),
    )
    assert first["files"] == {"pages": first["sha256"]}
    assert len({first["sha256"], other["sha256"], renamed["sha256"]}) == 3


def test_a_note_names_the_first_files(tmp_path: Path) -> None:
    files = {f"pages/{number}.txt": f"Schön {number}".encode("windows-1252") for number in range(5)}
    folder = ingest_into(tmp_path / "out", copy_files(tmp_path, files), **NO_FACTS, sources=[DOCS])
    assert manifest(folder)["pages"]["notes"] == [
        "pages/0.txt, pages/1.txt, pages/2.txt and 2 more files: not UTF-8, read as windows-1252; set `encoding` if "
        "that is wrong"
    ]


def test_sources_without_names_get_distinct_ones(tmp_path: Path) -> None:
    copied = copy_files(tmp_path, {"a/tea.txt": b"Green.", "b/tea.md": b"White.", "prose.txt": b"Prose."})
    paths = ["a/tea.txt", "b/tea.md", "prose.txt", "**/tea.*", "a/*"]
    sources = [{"kind": "files", "path": path} for path in paths]
    folder = ingest_into(tmp_path / "out", copied, **NO_FACTS, sources=sources)
    assert list(manifest(folder)) == ["tea", "tea-2", "prose-2", "files", "a"]
