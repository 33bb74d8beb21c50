"""Rules between `ingest.sources` and the entries that read its tables: what no source provides, no stage can read.

`tasks/ingest/survey.py` says which tables a source may fill. A source whose content is not here yet (a remote file, a
data set on the hub, a database) counts as every table that its settings do not rule out. Missing values are skipped
here, because `params_file.check` reports them.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tasks.common.harness.job import StageError
from tasks.common.model_graph import Params, lookup
from tasks.common.text.mixtures import apportion
from tasks.rules.models import Entry, entries

SourceTables = list[tuple[Mapping[str, Any], set[str]]]

SOURCES = Path("data/sources")
MIXTURES = {  # stage: the settings of a mixture, of the windows in a batch, and what must be above 0 for it to be read
    "pretrain": ("mixture", "batch", None),
    "finetune": ("pretraining_mix.mixture", "pretraining_mix.batch", "pretraining_mix.weight"),
    "align": ("algorithm.ptx.mixture", "algorithm.ptx.batch", "algorithm.ptx.weight"),
    "prune": ("mixture", "windows", "windows"),
}
NEEDS = {  # stage: the table that its entries learn from
    "pretrain": "corpus", "finetune": "instructions", "reward": "rankings", "align": "instructions",
    "prune": "instructions",
}  # fmt: skip
SELECTIVE_STAGES = ("finetune", "align", "prune", "evaluate")  # whose setting `sources` selects conversations
ANSWERLESS_FORMATS = ("alpaca", "sharegpt", "openai")
TABLE_NAMES = {
    "corpus": "documents (table corpus)",
    "instructions": "conversations (table instructions)",
    "rankings": "rankings or preference pairs (table rankings)",
}


def check_data(params: Params, sources: SourceTables) -> Iterator[str]:
    """Report entries, mixtures and a tokenizer that need rows which no source provides."""
    provided, kinds = set[str]().union(*(tables for _, tables in sources)), _kinds_of_text(sources)
    for entry in entries(params, *NEEDS):
        yield from _check_table(entry, provided)
        yield from _check_mixture(entry, kinds)
        yield from _check_shares(entry)
    for entry in entries(params, *SELECTIVE_STAGES):
        yield from _check_source_names(entry, sources)
    trained = lookup(params, "tokenize.tokenizer.name") == "train"
    if trained and provided.isdisjoint(("corpus", "instructions")):
        yield (
            "tokenize.tokenizer.name: found 'train', but no source provides documents or conversations to train a "
            "tokenizer on: add one to ingest.sources, or take a model's tokenizer with {name: from, path: its folder}"
        )


def tables_by_source(params: Params) -> SourceTables:
    """Return each source with the tables that it may add rows to; reads the first rows of files that state none."""
    return [(source, _tables(source, params)) for source in _sources(params)]


def check_source_files(params: Params) -> Iterator[str]:
    """Report files and folders of `ingest` that do not exist or cannot be read."""
    for number, source in enumerate(_sources(params)):
        yield from (f"ingest.sources.{number}, {problem.rstrip('.')}" for problem in _survey(source).problems)
    for name in ("wordings", "names"):
        path = lookup(params, f"ingest.{name}")
        if isinstance(path, str) and not (SOURCES / path).is_file():
            yield f"ingest.{name}: found {path!r}, but there is no file {SOURCES / path}: put it there, or correct it"


def gives_answers(sources: SourceTables) -> bool:
    """Return whether some source may give conversations with short answers."""
    found = [source for source, tables in sources if tables & {"facts", "instructions"}]
    return any(source.get("format") not in ANSWERLESS_FORMATS for source in found)


def _sources(params: Params) -> list[Mapping[str, Any]]:
    listed = lookup(params, "ingest.sources")
    return [source for source in listed if isinstance(source, Mapping)] if isinstance(listed, list) else []


def _tables(source: Mapping[str, Any], params: Params) -> set[str]:
    """Return the tables that a source may add rows to, with those made from facts and ratings."""
    found = {str(source["table"])} if source.get("table") else set(_survey(source).tables)
    if "facts" in found:
        found |= {"corpus", "instructions"}
    if "ratings" in found:
        found |= {"rankings"} | ({"corpus"} if lookup(params, "ingest.ratings.in_corpus") else set())
    return found


def _survey(source: Mapping[str, Any]) -> Any:
    """Return what a source provides and what is wrong with it; for invalid settings, reported elsewhere, all tables."""
    # By name, so that the code of `ingest` does not enter the recipe of every stage that checks settings.
    module = import_module("tasks.ingest.survey")
    kind: Any = import_module("tasks.ingest.source_settings").Source
    try:
        return module.survey([TypeAdapter(kind).validate_python(source)], SOURCES)[0]
    except ValidationError:
        return module.Survey("", frozenset(module.ALL_TABLES), ())


def _check_table(entry: Entry, provided: set[str]) -> Iterator[str]:
    stage, where, content = entry
    pairs = stage == "align" and lookup(content, "reward.name") == "rankings"
    table = "rankings" if pairs else NEEDS[stage]
    if table not in provided:
        yield f"{where}: it learns from {TABLE_NAMES[table]}, but no source in ingest.sources provides any: add one"


def _check_source_names(entry: Entry, sources: SourceTables) -> Iterator[str]:
    """Report names in an entry's `sources` that no source has, or a source without conversations."""
    _, where, content = entry
    names = lookup(content, "sources")
    known = {str(source.get("name")): tables for source, tables in sources}
    with_rows = ", ".join(name for name, tables in known.items() if "instructions" in tables) or "none"
    for number, name in enumerate(names if isinstance(names, list) else ()):
        if name not in known:
            yield (
                f"{where}.sources.{number}: found {name!r}, but no source in ingest.sources has this name; those with "
                f"conversations are {with_rows}"
            )
        elif "instructions" not in known[name]:
            yield (
                f"{where}.sources.{number}: found {name!r}, but this source provides no conversations (table "
                f"instructions); those that do are {with_rows}"
            )


def _check_mixture(entry: Entry, kinds: list[str]) -> Iterator[str]:
    """Report kinds of text in a mixture that no source provides."""
    _, where, _ = entry
    setting, mixture = _mixture(entry)
    for name in mixture:
        if name not in kinds:
            made = " (documents made from facts)" if name == "statements" else ""
            yield (
                f"{where}.{setting}: found {name!r}, but no source provides such documents{made}; there are "
                f"{', '.join(kinds) or 'none'}"
            )


def _check_shares(entry: Entry) -> Iterator[str]:
    """Report a kind of text in a mixture that would get less than one window of a batch."""
    stage, where, content = entry
    setting, mixture = _mixture(entry)
    size = lookup(content, MIXTURES[stage][1]) if mixture else None
    numbers = all(isinstance(value, int | float) for value in mixture.values())
    if not isinstance(size, int) or not numbers or lookup(content, "objective") == "masked":  # reads whole documents
        return
    try:
        apportion(mixture, size)
    except StageError as error:
        yield f"{where}.{setting}: {str(error).rstrip('.')}"


def _mixture(entry: Entry) -> tuple[str, Mapping[str, Any]]:
    """Return an entry's setting of a mixture and its value; an empty one if the entry reads none."""
    stage, _, content = entry
    setting, _, switch = MIXTURES.get(stage, ("", "", None))
    mixture = lookup(content, setting)
    is_read = isinstance(mixture, Mapping) and (switch is None or lookup(content, switch))
    return setting, mixture if is_read else {}


def _kinds_of_text(sources: SourceTables) -> list[str]:
    """Return the names that a mixture may use: statements, prose, and the sources and groups of documents."""
    made = ["statements"] if any("facts" in tables for _, tables in sources) else []
    documents = [source for source, tables in sources if "corpus" in tables]
    prose = any("corpus" in tables and tables != {"facts", "corpus", "instructions"} for _, tables in sources)
    prose = prose or any(source.get("reader") == "elements" for source in documents)
    names = [str(source[key]) for source in documents for key in ("name", "group") if source.get(key)]
    return list(dict.fromkeys([*made, *(["prose"] if prose else []), *names]))
