"""Reads a Hugging Face dataset row by row, from the hub or from files."""

import datetime
import decimal
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.common import identity
from tasks.common.harness.job import StageError
from tasks.ingest.archives import MALFORMED_ERRORS
from tasks.ingest.columns import fields_of
from tasks.ingest.reading import Reading
from tasks.ingest.row_loading import load_iterated
from tasks.ingest.source_settings import Dataset

DATASETS_CACHE = "data/.cache/datasets"
# `datasets` does not wrap the exceptions of the libraries that it uses.
READ_ERRORS = (AttributeError, RuntimeError, ArithmeticError, *MALFORMED_ERRORS)


def read(source: Dataset, folder: Path, reading: Reading) -> None:
    """Load the rows of a dataset, and compute the hash of their contents while they are read."""
    hashed = hashlib.sha256()

    def hashed_rows() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(_read_rows(source, folder), 1):
            separator = "\x00" if number > 1 else ""
            content = separator + json.dumps(row, sort_keys=True, default=_describe)
            hashed.update(content.encode("utf-8", "surrogatepass"))
            yield f"row {number}", row

    load_iterated(hashed_rows(), source.path, "dataset", source.options, reading)
    reading.files = {name: identity.file_hash(folder / name) for name in source.data_files}
    reading.sha256 = hashed.hexdigest()


def _describe(value: Any) -> str:
    """Return a text for a value that JSON lacks, the same in every run; of an image only its type."""
    return str(value) if isinstance(value, datetime.date | datetime.time | decimal.Decimal) else type(value).__name__


def _read_rows(source: Dataset, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows; raise StageError for any error, which for a streamed dataset may come at any row."""
    from datasets.exceptions import DatasetsError

    try:
        yield from _load_rows(source, folder)
    except (DatasetsError, *READ_ERRORS) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        if "to null" in f"{error}{cause}":
            raise StageError(f"source {source.name}: {_describe_null_column(source, folder)}") from error
        raise StageError(
            f"source {source.name}: expected the dataset {source.path} (config {source.config}, split {source.split}, "
            f"revision {source.revision}), but it could not be read: {error}{cause}"
        ) from error


def _describe_null_column(source: Dataset, folder: Path) -> str:
    """Return which column has no value in the first rows, so that `datasets` takes null for its type."""
    from datasets.exceptions import DatasetsError

    nulls, count = set[str](), 0
    try:
        for count, row in enumerate(_load_rows(source.model_copy(update={"streaming": True}), folder), 1):
            empty = {name for name, value in row.items() if value is None}
            nulls = empty if count == 1 else nulls & empty
    except (DatasetsError, *READ_ERRORS):
        pass  # the error that is explained here
    files = ", ".join(source.data_files) or source.path
    return (
        f"the column {' or '.join(sorted(nulls)) or 'with values'} of {files} is null in the first {count} rows and "
        "has values after them, which `datasets` cannot read. List the file as a source of kind files, which reads "
        "each row by itself."
    )


def _load_rows(source: Dataset, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the dataset; raise StageError if a column that the source maps is not in them."""
    from datasets import load_dataset

    local = source.path.startswith("./")
    path = str(folder / source.path) if local else source.path
    files = [str(folder / name) for name in source.data_files]
    absent = [name for name in ([*files, path] if local else files) if not Path(name).exists()]
    if absent:
        raise StageError(f"source {source.name}: expected {', '.join(absent)}, found nothing there.")
    data = load_dataset(
        path, source.config, data_files=files or None, split=source.split, revision=source.revision,
        streaming=source.streaming, cache_dir=DATASETS_CACHE,
    )  # fmt: skip
    wanted = [field for value in source.columns.values() for field in fields_of(value)]
    for row in data if source.limit is None else data.take(source.limit):
        missing = sorted(field for field in wanted if field not in row and field.partition(".")[0] not in row)
        if missing:
            raise StageError(
                f"source {source.name}: expected the columns {', '.join(sorted(wanted))}, "
                f"found {', '.join(sorted(row))}. Missing: {', '.join(missing)}."
            )
        yield row
