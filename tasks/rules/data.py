"""Rules between `ingest.sources` and the entries that read its tables: what no source provides, no stage can read.

Sources of unknown content (data sets on the hub, whose table is stated but whose rows are not known) count as what they
state. Missing values are skipped here, because `params_file.check` reports them.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from tasks.common.model_graph import Params, lookup
from tasks.rules.models import Entry, entries

SourceTables = list[tuple[Mapping[str, Any], set[str]]]

SOURCES = Path("data/sources")
DETECTION_ROWS = 20  # of each file, read to detect its table
READER_TABLES = {  # of the readers of package archives
    "countries": {"facts"}, "elements": {"facts", "corpus"}, "speeches": {"corpus"}, "ratings": {"ratings"},
}  # fmt: skip
MIXTURES = {  # stage: the setting of a mixture, and the setting that must be above 0 for it to be read
    "pretrain": ("mixture", None),
    "finetune": ("pretraining_mix.mixture", "pretraining_mix.weight"),
    "align": ("algorithm.ptx.mixture", "algorithm.ptx.weight"),
    "prune": ("mixture", "windows"),
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


def check_data(params: Params) -> Iterator[str]:
    """Report entries, mixtures and a tokenizer that need rows which no source provides."""
    sources = tables_by_source(params)
    provided, kinds = set[str]().union(*(tables for _, tables in sources)), _kinds_of_text(sources)
    for entry in entries(params, *NEEDS):
        yield from _check_table(entry, provided)
        yield from _check_mixture(entry, kinds)
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


def gives_answers(sources: SourceTables) -> bool:
    """Return whether some source may give conversations with short answers."""
    found = [source for source, tables in sources if tables & {"facts", "instructions"}]
    return any(source.get("format") not in ANSWERLESS_FORMATS for source in found)


def _sources(params: Params) -> list[Mapping[str, Any]]:
    listed = lookup(params, "ingest.sources")
    return [source for source in listed if isinstance(source, Mapping)] if isinstance(listed, list) else []


def _tables(source: Mapping[str, Any], params: Params) -> set[str]:
    """Return the tables that a source may add rows to, with those made from facts and ratings."""
    kind = source.get("kind")
    if kind == "rankings":  # a folder that may be empty
        return {"rankings"} if any((SOURCES / str(source.get("path"))).glob("*.parquet")) else set()
    if kind == "llamafactory":  # its dataset_info.json states which data sets are rankings
        return {"instructions", "rankings"}
    found = set(READER_TABLES.get(str(source.get("reader")), ())) if kind == "package" else _stated(source)
    if "facts" in found:
        found |= {"corpus", "instructions"}
    if "ratings" in found:
        found |= {"rankings"} | ({"corpus"} if lookup(params, "ingest.ratings.in_corpus") else set())
    return found


def _stated(source: Mapping[str, Any]) -> set[str]:
    """Return the table that a source names, or those that its files seem to have; all where that is not known."""
    if source.get("table"):
        return {str(source["table"])}
    path = source.get("path")
    if source.get("kind") == "files" and isinstance(path, str):
        # By name, so that the code of `ingest` does not enter the recipe of every stage that checks settings.
        found = import_module("tasks.ingest.inspection").inspect(SOURCES / path, max_rows=DETECTION_ROWS)
        if found.tables:
            return set(found.tables)
    return set(TABLE_NAMES)


def check_source_files(params: Params) -> Iterator[str]:
    """Report files and folders of sources that do not exist."""
    for number, source in enumerate(_sources(params)):
        path = source.get("path") if source.get("kind") in ("files", "rankings", "llamafactory") else None
        if isinstance(path, str) and path and not (SOURCES / path).exists() and not any(SOURCES.glob(path)):
            yield (
                f"ingest.sources.{number}.path: found {path!r}, but {SOURCES / path} does not exist: put the file "
                "there, or correct the path"
            )


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
    stage, where, content = entry
    setting, switch = MIXTURES.get(stage, (None, None))
    mixture = lookup(content, setting) if setting else None
    if not isinstance(mixture, Mapping) or (switch and not lookup(content, switch)):
        return
    for name in mixture:
        if name not in kinds:
            made = " (documents made from facts)" if name == "statements" else ""
            yield (
                f"{where}.{setting}: found {name!r}, but no source provides such documents{made}; there are "
                f"{', '.join(kinds) or 'none'}"
            )


def _kinds_of_text(sources: SourceTables) -> list[str]:
    """Return the names that a mixture may use: statements, prose, and the sources and groups of documents."""
    made = ["statements"] if any("facts" in tables for _, tables in sources) else []
    documents = [source for source, tables in sources if "corpus" in tables]
    prose = any("corpus" in tables and tables != {"facts", "corpus", "instructions"} for _, tables in sources)
    prose = prose or any(source.get("reader") == "elements" for source in documents)
    names = [str(source[key]) for source in documents for key in ("name", "group") if source.get(key)]
    return list(dict.fromkeys([*made, *(["prose"] if prose else []), *names]))
