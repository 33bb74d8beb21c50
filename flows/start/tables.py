"""What is in the user's data files: each option's paths become a table with its sources."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.start.brought import Table
from flows.start.pipeline import OPTIONS
from tasks.common.settings import BessemerError

if TYPE_CHECKING:
    from tasks.ingest.inspection import Inspection

LABEL_COLUMNS = ("label", "labels", "class", "category", "intent", "sentiment", "topic", "target", "output", "answer")
TEXT_COLUMNS = ("text", "sentence", "content", "message", "review", "comment", "question", "input", "instruction")
LANGUAGE_TEXTS = 100  # of the rows read, to detect their languages
MIN_LANGUAGE_SHARE = 0.05
NOUNS = {"corpus": "documents", "instructions": "conversations", "rankings": "preferences", "labels": "labelled texts"}


def read_table(option: str, paths: Sequence[Path]) -> Table:
    """Inspect the paths of an option, print a line about each, and return them as a table.

    Raises BessemerError if a path contains no usable row.
    """
    names = Counter(path.name for path in paths)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise BessemerError(
            f"--{option}: several paths are called {', '.join(twice)}; rename one, or copy both into a folder."
        )
    rows, characters, longest = 0, 0.0, 0
    sources: list[dict[str, Any]] = []
    for path in paths:
        found, columns = _inspect(option, path)
        sources.append(_source(OPTIONS[option], path, columns))
        rows += found.estimated_rows
        characters += found.estimated_rows * found.mean_characters
        longest = max(longest, found.max_characters)
        click.echo(f"{path}: {_describe(found, NOUNS[OPTIONS[option]], columns)}")
        for problem in found.problems[:3]:
            click.echo(f"  {problem}")
    return Table(rows, characters / max(rows, 1), longest, tuple(sources))


def _source(table: str, path: Path, columns: dict[str, str]) -> dict[str, Any]:
    """Return the item of `ingest.sources` for a path that is copied to data/sources/."""
    found = {"kind": "files", "path": path.name, "table": "instructions" if table == "labels" else table}
    return {**found, "format": "alpaca", "columns": columns} if columns else found


def _inspect(option: str, path: Path) -> "tuple[Inspection, dict[str, str]]":
    """Return what is in a path, and the columns that have to be named for it."""
    from tasks.ingest.inspection import inspect
    from tasks.ingest.row_loading import RowOptions

    if not path.exists():
        raise BessemerError(f"--{option}: {path} does not exist; correct the path.")
    columns = _label_columns(path) if option == "labels" else {}
    table = "instructions" if option == "labels" else OPTIONS[option]
    found = inspect(path.resolve(), RowOptions(table=table, layout="alpaca" if columns else None, columns=columns))
    if not found.tables:
        why = found.problems[0] if found.problems else "it is empty"
        raise BessemerError(f"--{option}: {path} contains no {NOUNS[OPTIONS[option]]} that can be used: {why}.")
    return found, columns


def _label_columns(path: Path) -> dict[str, str]:
    """Return which columns hold a text and its label. Raises BessemerError if they cannot be told from their names."""
    from tasks.ingest.inspection import inspect

    columns = inspect(path.resolve(), max_rows=20).columns
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    text = next((name for name in TEXT_COLUMNS if name in columns and name != label), None)
    if not label or not text:
        raise BessemerError(
            f"--labels: {path} has the columns {', '.join(columns) or 'none'}; expected a text "
            f"({', '.join(TEXT_COLUMNS[:4])} ...) and its label ({', '.join(LABEL_COLUMNS[:4])} ...). "
            "Rename two columns."
        )
    return {"instruction": text, "output": label}


def _describe(found: "Inspection", noun: str, columns: dict[str, str]) -> str:
    """Return one line: rows, formats, lengths, languages and the columns that are read under another name."""
    formats = ", ".join(f"{count} {name}" if found.files > 1 else name for name, count in found.formats.items())
    about = "" if found.rows_read == found.estimated_rows else "about "
    parts = [
        f"{about}{found.estimated_rows:,} {noun} ({formats})",
        f"{found.mean_characters:,.0f} characters each, at most {found.max_characters:,}",
    ]
    languages = _languages(found.texts)
    parts += [", ".join(languages)] if languages else []
    mapped = {**found.mapped, **columns}
    parts += [", ".join(f"{name} from `{column}`" for name, column in mapped.items())] if mapped else []
    if found.rows_rejected:
        parts.append(f"{found.rows_rejected} of {found.rows_read:,} rows read are rejected")
    return "; ".join(parts)


def _languages(texts: Sequence[str]) -> list[str]:
    """Return the languages of a sample of texts with their shares, such as `de 98 %`."""
    from py3langid import langid

    step = max(1, len(texts) // LANGUAGE_TEXTS)
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_DIR / langid.MODEL_FILE, norm_probs=True)
    counts = Counter(identifier.classify(text[:2000])[0] for text in texts[::step])
    total = sum(counts.values())
    return [
        f"{code} {count / total:.0%}" for code, count in counts.most_common(3) if count >= MIN_LANGUAGE_SHARE * total
    ]
