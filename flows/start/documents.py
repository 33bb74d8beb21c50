"""Sources of documents, and what sources of both tools have in common."""

from pathlib import Path

from flows.start.result import Draft, Source

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # of `datasets`
OBJECT_SUFFIXES = (".json", ".jsonl", ".parquet")  # of conversations and pairs
LICENCE = "unknown"


def document_source(name: str, file: Path, column: str, draft: Draft) -> Source:
    """Return a source of documents in a text file, or in a column of a JSON, CSV or Parquet file."""
    target = f"{name}/{file.name}"
    shared = {"name": name, "licence": LICENCE, "table": "corpus"}
    if file.suffix == ".txt":
        draft.notes.append(f"{file.name}: a document is a paragraph here, a line there.")
        return Source({**shared, "kind": "files", "path": target, "format": "txt"}, {target: file.resolve()})
    settings = {
        **shared, "kind": "dataset", "path": BUILDERS[file.suffix], "data_files": [target], "split": "train",
        "columns": {"text": column},
    }  # fmt: skip
    return Source(settings, {target: file.resolve()})
