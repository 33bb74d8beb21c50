"""Text of files that are documents: plain text and Markdown as they are, the main text of HTML, the pages of a PDF."""

import re
from codecs import lookup
from collections.abc import Iterator
from contextlib import closing

from tasks.ingest import readers
from tasks.ingest.source_files import Rows, SourceFile, UnreadableFile

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
META_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?([\w-]+)", re.IGNORECASE)


def read(file: SourceFile, format: str, by_paragraph: bool) -> Rows:
    """Yield the document, or its paragraphs, with the name of its file."""
    if not by_paragraph:
        yield "", {"text": DOCUMENT_READERS[format](file), "file": file.label}
        return
    paragraphs = readers.split_paragraphs(_iter_lines(file, format))
    for number, paragraph in enumerate(paragraphs, 1):
        yield f"paragraph {number}", {"text": paragraph, "file": file.label}


def _iter_lines(file: SourceFile, format: str) -> Iterator[str]:
    if format in ("txt", "md"):
        with file.open_text() as opened:
            yield from opened
    else:
        yield from DOCUMENT_READERS[format](file).split("\n")


def _read_plain(file: SourceFile) -> str:
    return file.text()


def _read_html(file: SourceFile) -> str:
    """Return the main text of a page; of a page without one, all its text."""
    from resiliparse.extract.html2text import extract_plain_text

    with file.open() as opened:
        content = opened.read()
    declared = META_CHARSET.search(content[:4096])
    if file.encoding is None and declared and _is_known(declared[1].decode()):
        page = content.decode(declared[1].decode(), "replace")
    else:
        page = file.text()
    text = extract_plain_text(page, main_content=True) or extract_plain_text(page)
    return _require_text(str(text), f"{file.label}: an HTML page without text")


def _is_known(encoding: str) -> bool:
    try:
        return lookup(encoding)._is_text_encoding
    except LookupError:
        return False


def _read_pdf(file: SourceFile) -> str:
    """Return the text of the pages of a PDF, with a blank line between them."""
    from pypdfium2 import PdfDocument, PdfiumError
    from pypdfium2.raw import FPDF_ERR_PASSWORD

    with file.open() as opened:
        try:
            with closing(PdfDocument(opened.read())) as document:
                pages = [_page_text(page.get_textpage().get_text_bounded()) for page in document]
        except PdfiumError as error:
            if error.err_code == FPDF_ERR_PASSWORD:
                raise UnreadableFile(f"{file.label}: an encrypted PDF; save it without its password") from error
            raise UnreadableFile(f"{file.label}: a damaged PDF ({error})") from error
    return _require_text(
        "\n\n".join(page for page in pages if page),
        f"{file.label}: a PDF without text; scanned pages need text recognition (OCR) first",
    )


def _page_text(extracted: str) -> str:
    """Return PDFium's text of a page without its control characters.

    U+0002 is a hyphen at the end of a line within a word, which is joined again. The others are signs of fonts that do
    not say which characters they show.
    """
    lines = re.sub("\x02\r?\n?", "", extracted).replace("\r\n", "\n")
    return CONTROL_CHARACTERS.sub(" ", lines).strip()


def _require_text(text: str, message: str) -> str:
    if not text.strip():
        raise UnreadableFile(message)
    return text


DOCUMENT_READERS = {"txt": _read_plain, "md": _read_plain, "html": _read_html, "pdf": _read_pdf}
