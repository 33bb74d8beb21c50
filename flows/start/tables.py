"""What is in the user's data files: each option's paths become a table with its sources."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.start.brought import Table
from flows.start.pipeline import OPTIONS
from tasks.common.settings import BessemerError

if TYPE_CHECKING:
    from tasks.ingest.inspection import Inspection

LABEL_NAMES = ("text", "label")  # what --columns calls the columns of labelled texts
LABEL_COLUMNS = ("label", "labels", "class", "category", "intent", "sentiment", "topic", "target", "output", "answer")
TEXT_COLUMNS = ("text", "sentence", "content", "message", "review", "comment", "question", "input", "instruction")
MAX_NUMBER_CLASSES = 20  # different numbers that are still classes, such as stars; more are learnt as numbers
LANGUAGE_TEXTS = 100  # of the rows read, to detect their languages
MIN_LANGUAGE_SHARE = 0.05
NOUNS = {"corpus": "documents", "instructions": "conversations", "rankings": "preferences", "labels": "labelled texts"}


def read_table(option: str, paths: Sequence[Path], columns: Mapping[str, str]) -> Table:
    """Inspect the paths of an option, print a line about each, and return them as a table.

    `columns` says where the table's columns are in files that call them otherwise. Raises BessemerError if a path
    contains no usable row.
    """
    names = Counter(path.name for path in paths)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise BessemerError(
            f"--{option}: several paths are called {', '.join(twice)}; rename one, or copy both into a folder."
        )
    rows, characters, longest = 0, 0.0, 0
    texts: list[str] = []
    sources: list[dict[str, Any]] = []
    for path in paths:
        named = _label_columns(path, columns) if option == "labels" else _known(option, columns)
        found = _inspect(option, path, named)
        sources.append(_source(option, path, named))
        rows += found.estimated_rows
        characters += found.estimated_rows * found.mean_characters
        longest = max(longest, found.max_characters)
        texts += found.texts
        click.echo(f"{path}: {_describe(found, NOUNS[OPTIONS[option]], named)}")
        for problem in found.problems[:3]:
            click.echo(f"  {problem}")
    task = _label_task([text.rpartition("\n")[2].strip() for text in texts]) if option == "labels" else {}
    return Table(rows, characters / max(rows, 1), longest, tuple(sources), task)


def _label_task(labels: Sequence[str]) -> dict[str, Any]:
    """Return the task of fine-tuning for labels, and print it: many numbers are learnt as numbers, others as classes.

    Raises BessemerError if the labels are no classes: only one, or hardly one twice.
    """
    counts = Counter(labels)
    numeric = all(_is_number(label) for label in counts)
    if numeric and len(counts) > MAX_NUMBER_CLASSES:
        click.echo(f"  {len(counts):,} different numbers: a regression model")
        return {"name": "regression"}
    named = ", ".join(repr(label[:40]) for label, _ in counts.most_common(3))
    if len(counts) < 2 or len(counts) > len(labels) / 2:
        raise BessemerError(
            f"--labels: found {len(counts)} different labels in {len(labels):,} texts ({named}); expected at least 2 "
            "classes with several texts each, or numbers. --columns label=... names another column; texts with "
            "answers of their own are --conversations."
        )
    click.echo(f"  {len(counts)} classes ({named}{', ...' * (len(counts) > 3)})")
    more = {"max_labels": 2 * len(counts)} if len(counts) > MAX_NUMBER_CLASSES / 2 else {}  # rows not read may add some
    return {"name": "classification", **more}


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False


def parse_columns(values: Sequence[str]) -> dict[str, str]:
    """Return the mapping in `NAME=FIELD` values. Raises BessemerError for another form, and for an unknown name."""
    from tasks.ingest.layouts import known_columns

    pairs = [value.partition("=") for value in values]
    known = known_columns(None, None) | set(LABEL_NAMES)
    wrong = [value for value, (name, _, field) in zip(values, pairs, strict=True) if name not in known or not field]
    if wrong:
        raise BessemerError(
            f"--columns: found {wrong[0]!r}, expected NAME=FIELD with a column of a table or format, one of "
            f"{', '.join(sorted(known))}, and where it is in the file: a field, a path (meta.text), or a template "
            "({title}: {body})."
        )
    return {name: field for name, _, field in pairs}


def _known(option: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Return those of the columns that the option's table has."""
    from tasks.ingest.layouts import known_columns

    return {name: field for name, field in columns.items() if name in known_columns(None, OPTIONS[option])}


def _source(option: str, path: Path, columns: dict[str, str]) -> dict[str, Any]:
    """Return the item of `ingest.sources` for a path that is copied to data/sources/."""
    table = "instructions" if option == "labels" else OPTIONS[option]
    layout = {"format": "alpaca"} if option == "labels" else {}
    return {"kind": "files", "path": path.name, "table": table, **layout, **({"columns": columns} if columns else {})}


def _inspect(option: str, path: Path, columns: dict[str, str]) -> "Inspection":
    """Return what is in a path. Raises BessemerError if there is no row that can be used."""
    from tasks.ingest.inspection import inspect
    from tasks.ingest.row_loading import RowOptions

    if not path.exists():
        raise BessemerError(f"--{option}: {path} does not exist; correct the path.")
    table, layout = ("instructions", "alpaca") if option == "labels" else (OPTIONS[option], None)
    found = inspect(path.resolve(), RowOptions(table=table, layout=layout, columns=columns))
    if not found.tables:
        why = found.problems[0] if found.problems else "it is empty"
        if found.columns:
            why += ". Here `--columns NAME=FIELD` says which columns are read"
        raise BessemerError(f"--{option}: {path} contains no {NOUNS[OPTIONS[option]]} that can be used: {why}.")
    return found


def _label_columns(path: Path, named: Mapping[str, str]) -> dict[str, str]:
    """Return where a text and its label are. Raises BessemerError if that is neither named nor clear from the names."""
    from tasks.ingest.inspection import inspect

    if named.keys() >= set(LABEL_NAMES):
        return {"instruction": named["text"], "output": named["label"]}
    columns = inspect(path.resolve(), max_rows=20).columns
    label = named.get("label") or next((name for name in LABEL_COLUMNS if name in columns), None)
    text = named.get("text") or next((name for name in TEXT_COLUMNS if name in columns and name != label), None)
    if not label or not text:
        raise BessemerError(
            f"--labels: {path} has the columns {', '.join(columns) or 'none'}; expected a text "
            f"({', '.join(TEXT_COLUMNS[:4])} ...) and its label ({', '.join(LABEL_COLUMNS[:4])} ...). "
            "Name them: --columns text=... label=..."
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
