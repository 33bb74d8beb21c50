"""Files of rows and of documents, and the sources of documents that both tools have."""

from pathlib import Path

from flows.start.translation.result import Draft, Source

ROW_KINDS = "JSON, JSON lines, CSV, Parquet or Arrow"


def holds_rows(file: Path) -> bool:
    """Return whether a file has rows with columns, by its name."""
    from tasks.ingest.formats import DOCUMENT_FORMATS

    return _format_of(file) not in (None, *DOCUMENT_FORMATS)


def holds_text(file: Path) -> bool:
    """Return whether a file has documents or rows, by its name."""
    return _format_of(file) is not None


def _format_of(file: Path) -> str | None:
    from tasks.ingest.formats import SUFFIXES
    from tasks.ingest.source_files import SourceFile

    return SUFFIXES.get(SourceFile(file, file.name).suffix)


def document_source(name: str, file: Path, column: str, draft: Draft) -> Source:
    """Return a source of the documents of a text file, or of a column of a file of rows."""
    target = f"{name}/{file.name}"
    columns = {"columns": {"text": column}} if holds_rows(file) and column != "text" else {}
    if file.suffix == ".txt":
        draft.notes.append(f"{file.name}: a document is a paragraph here, a line there.")
    settings = {"name": name, "kind": "files", "path": target, "table": "corpus", **columns}
    return Source(settings, {target: file.resolve()})
