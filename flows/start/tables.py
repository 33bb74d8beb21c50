"""What is in the user's data files: each option's paths become a table with its sources."""

import difflib
import re
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
LABEL_FORMAT = {"text": "instruction", "label": "output"}  # their columns in alpaca's format, as which they are read
LABEL_COLUMNS = ("label", "labels", "class", "category", "intent", "sentiment", "topic", "target", "output", "answer")
TEXT_COLUMNS = ("text", "sentence", "content", "message", "review", "comment", "question", "input", "instruction")
EXPECTED = {  # columns of an option's rows, and how to name them
    "text": "expected a text (text). Name it: --columns text=NAME",
    "conversations": "expected a question (question, prompt, instruction ...) and its answer (answer, response, output "
    "...), or messages. Name them: --columns instruction=NAME output=NAME",
    "preferences": "expected a prompt with a chosen and a rejected reply (prompt, chosen, rejected), or with ranked "
    "answers. Name them: --columns prompt=NAME chosen=NAME rejected=NAME",
}
MAX_NUMBER_CLASSES = 20  # different numbers that are still classes, such as stars; more are learnt as numbers
LANGUAGE_TEXTS = 100  # of the rows read, to detect their languages
LANGUAGE_CHARACTERS = 300  # shorter texts are identified together with their neighbours
NO_LANGUAGE = "zxx"  # py3langid's code for text in no language
MIN_LANGUAGE_SHARE = 0.05
SHOWN_CLASSES = 8
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
    labels, all_read = Counter[str](), True
    sources: list[dict[str, Any]] = []
    for path in paths:
        named = _label_columns(path, columns) if option == "labels" else _known(option, columns)
        found = _inspect(option, path, named)
        sources.append(_source(option, path, named))
        rows += found.estimated_rows
        characters += found.estimated_rows * found.mean_characters
        longest = max(longest, found.max_characters)
        click.echo(f"{path}: {_describe(found, NOUNS[OPTIONS[option]], named)}")
        for problem in found.problems[:3]:
            click.echo(f"  {problem}")
        labels.update(found.answers)
        all_read &= found.rows_read == found.estimated_rows
    task = _label_task(labels, all_read=all_read) if option == "labels" else {}
    return Table(rows, characters / max(rows, 1), longest, tuple(sources), task)


def _label_task(counts: Mapping[str, int], *, all_read: bool) -> dict[str, Any]:
    """Return the task of fine-tuning for labels, and print it: many numbers are learnt as numbers, others as classes.

    `counts` are the labels of the rows read. Raises BessemerError if they are no classes: one alone, or hardly one of
    them twice.
    """
    total = sum(counts.values())
    if len(counts) > MAX_NUMBER_CLASSES and all(map(_is_number, counts)):
        click.echo(f"  {len(counts):,} different numbers: a regression model")
        return {"name": "regression"}
    if len(counts) == 1 and all_read:
        raise BessemerError(
            f"--labels: all {total:,} texts have the label {next(iter(counts))!r:.80}; expected two or more classes. "
            "Add rows of another class, or name the column with --columns label=NAME."
        )
    if len(counts) > max(SHOWN_CLASSES, total / 2):
        raise BessemerError(
            f"--labels: found {len(counts):,} different labels in {total:,} texts; expected classes with several texts "
            "each, or numbers. --columns label=NAME names another column; texts with answers of their own are "
            "--conversations."
        )
    click.echo(f"  {_describe_classes(counts)}")
    more = {"max_labels": 2 * len(counts)} if len(counts) > MAX_NUMBER_CLASSES / 2 else {}  # rows not read may add some
    return {"name": "classification", **more}


def _describe_classes(counts: Mapping[str, int]) -> str:
    """Return one line about the classes of labelled texts."""
    largest = sorted(counts.items(), key=lambda item: -item[1])[:SHOWN_CLASSES]
    shown = ", ".join(f"{label[:40]} {count:,}" for label, count in largest)
    others = f" and {len(counts) - SHOWN_CLASSES} more" if len(counts) > SHOWN_CLASSES else ""
    single = sum(count == 1 for count in counts.values())
    note = f"; {single} of them with one row, which is either trained on or held out" if single else ""
    return f"{len(counts)} classes: {shown}{others}{note}"


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
            f"--columns: found {wrong[0]!r}, expected NAME=FIELD, for example text=body.{_nearest(wrong[0], known)} "
            "FIELD is where it is in the file: a field, a path (meta.text), or a template ({title}: {body})."
        )
    return {name: field for name, _, field in pairs}


def _nearest(value: str, known: set[str]) -> str:
    """Return a sentence about the names like the one in a wrong `NAME=FIELD`, or about all names."""
    name = re.split("[=:]", value)[0]
    if name in known:
        return ""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f" NAME may be {' or '.join(near)}."
    return f" NAME is a column of a table or format: {', '.join(sorted(known))}."


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
        raise BessemerError(f"--{option}: {path} {_describe_unusable(option, path, found, columns)}.")
    return found


def _describe_unusable(option: str, path: Path, found: "Inspection", columns: Mapping[str, str]) -> str:
    """Return what is in a path without a row that the option can use, and what to do."""
    from tasks.ingest.inspection import inspect

    noun = NOUNS[OPTIONS[option]]
    other = None if columns else inspect(path.resolve(), max_rows=20).table
    named = next((name for name, table in OPTIONS.items() if table == other and name != option), None)
    is_other_table = named == "text" and not {"text", "file"}.issuperset(found.columns)  # one that has a text, too
    if named and not is_other_table:
        return f"contains {NOUNS[OPTIONS[named]]}, not {noun}: name it with --{named}"
    if found.unknown_columns and option in EXPECTED and not columns:
        return f"has the columns {', '.join(found.columns)}; {EXPECTED[option]}"
    why = found.problems[0] if found.problems else "it is empty"
    return f"contains no {noun} that can be used: {why}"


def _label_columns(path: Path, named: Mapping[str, str]) -> dict[str, str]:
    """Return where a text and its label are. Raises BessemerError if that is neither named nor clear from the names."""
    from tasks.ingest.inspection import inspect

    if named.keys() >= set(LABEL_NAMES):
        return {LABEL_FORMAT[name]: named[name] for name in LABEL_NAMES}
    found = inspect(path.resolve(), max_rows=20)
    columns = {name.lower(): name for name in reversed(found.columns)}
    label = named.get("label") or next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
    texts = (columns[name] for name in TEXT_COLUMNS if name in columns)
    text = named.get("text") or next((name for name in texts if name != label), None)
    if not columns:
        why = found.problems[0] if found.problems else "it has no columns"
        raise BessemerError(f"--labels: {path} contains no labelled texts that can be used: {why}.")
    if not label or not text:
        raise BessemerError(
            f"--labels: {path} has the columns {', '.join(found.columns)}; expected a text "
            f"({', '.join(TEXT_COLUMNS[:4])} ...) and its label ({', '.join(LABEL_COLUMNS[:4])} ...). "
            "Name them: --columns text=NAME label=NAME."
        )
    return {LABEL_FORMAT["text"]: text, LABEL_FORMAT["label"]: label}


def _describe(found: "Inspection", noun: str, columns: dict[str, str]) -> str:
    """Return one line: rows, formats, lengths, languages and the columns that are read under another name."""
    formats = ", ".join(f"{count} {name}" if found.files > 1 else name for name, count in found.formats.items())
    about = "" if found.rows_read == found.estimated_rows else "about "
    parts = [
        f"{about}{found.estimated_rows:,} {noun[:-1] if found.estimated_rows == 1 else noun} ({formats})",
        f"{found.mean_characters:,.0f} characters each, at most {found.max_characters:,}",
    ]
    languages = _languages(found.texts)
    parts += [", ".join(languages)] if languages else []
    labels = {column: name for name, column in LABEL_FORMAT.items()} if noun == NOUNS["labels"] else {}
    mapped = {labels.get(name, name): column for name, column in {**found.mapped, **columns}.items()}
    parts += [", ".join(f"{name} from `{column}`" for name, column in mapped.items())] if mapped else []
    if found.rows_rejected:
        parts.append(f"{found.rows_rejected} of {found.rows_read:,} rows read are rejected")
    return "; ".join(parts)


def _languages(texts: Sequence[str]) -> list[str]:
    """Return the languages of a sample of texts with their shares, such as `de 98 %`."""
    from py3langid import langid

    joined = _join_short(texts)
    step = max(1, len(joined) // LANGUAGE_TEXTS)
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_DIR / langid.MODEL_FILE, norm_probs=True)
    counts = Counter(identifier.classify(text[:2000])[0] for text in joined[::step])
    total = sum(counts.values())
    del counts[NO_LANGUAGE]
    return [
        f"{code} {count / total:.0%}" for code, count in counts.most_common(3) if count >= MIN_LANGUAGE_SHARE * total
    ]


def _join_short(texts: Sequence[str]) -> list[str]:
    """Return the texts, short ones joined: the language of a few words cannot be identified."""
    joined, last = list[str](), ""
    for text in texts:
        last = f"{last}\n{text}" if last else text
        if len(last) >= LANGUAGE_CHARACTERS:
            joined.append(last)
            last = ""
    return joined if joined else [last] if last else []
