"""Stage `ingest`: reads the sources in `params.yaml` into three tables (corpus, instructions, rankings).

Run as `python -m tasks.ingest`. Facts are an intermediate form: later sources override earlier ones, and the wordings
turn facts into statements (corpus) and chats (instructions). Rated sentences become rankings; those of the training
split may be in the corpus too. Rows that enter no table are written to `rejected.jsonl` with a reason: the rows read
from a source are the rows used and the rows rejected. `sources.json` is the manifest, with one entry for each source.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tasks.common.harness import records
from tasks.common.harness.job import Job, StageError
from tasks.ingest import archived_model, facts
from tasks.ingest.corpus import Corpus, ProseSink, RejectedFile
from tasks.ingest.fact_resolution import load_names, resolve_facts
from tasks.ingest.finished_rows import FinishedRows
from tasks.ingest.reading import Reading
from tasks.ingest.settings import Config
from tasks.ingest.source_reading import read_source
from tasks.ingest.source_settings import UNKNOWN_LICENCE
from tasks.ingest.survey import survey
from tasks.ingest.table_rows import add_rated, add_statements, group_rated, make_instructions, make_rankings

NUMERICS = False  # no model computes here
INPUTS = {"sources": "data/sources"}
OUTPUTS = {
    "corpus": "data/ingest/corpus",
    "instructions": "data/ingest/instructions",
    "rankings": "data/ingest/rankings",
    "sources": "data/ingest/sources.json",
    "rejected": "data/ingest/rejected.jsonl",
    "checkpoint": "data/ingest/checkpoint",
}

Counts = dict[str, Counter[tuple[str, str]]]  # by table: number of rows by (source, split)


def run(config: Config, job: Job) -> dict[str, Any]:
    """Read every source, and write the three tables, the rejected rows, the model and the manifest."""
    from tqdm import tqdm

    folder = job.inputs["sources"]
    wordings = facts.load_wordings(folder / config.wordings) if config.wordings else facts.NO_WORDINGS
    unknown = sorted(set(config.relations) - set(wordings.relations))
    if unknown:
        raise StageError(
            f"ingest.relations names {', '.join(unknown)}, but {config.wordings or 'ingest'} has no wordings for it. "
            "Add the wordings, or remove the relation."
        )
    problems = [problem for found in survey(config.sources, folder) for problem in found.problems]
    if problems:
        raise StageError("\n".join(problems))
    namings = load_names(folder / config.names) if config.names else {}
    with (
        RejectedFile(job.outputs["rejected"]) as rejected,
        TemporaryDirectory(dir=job.outputs["corpus"].parent) as scratch,
    ):
        corpus = Corpus(Path(scratch, "documents"), config.salt, config.heldout.prose)
        finished = {
            "instructions": FinishedRows(Path(scratch, "chats"), "instructions", config.salt, config.heldout.entities),
            "rankings": FinishedRows(Path(scratch, "rankings"), "rankings", config.salt, config.heldout.rankings),
        }
        sinks = {source.name: ProseSink(corpus, source.name, source.group, source.licence) for source in config.sources}
        readings = [
            Reading(source.name, source.licence, prose=sinks[source.name], rejected=rejected, rows=finished)
            for source in config.sources
        ]
        for source, reading in zip(tqdm(config.sources, desc="ingest", unit="source"), readings, strict=True):
            read_source(source, folder, reading)
        known_facts = resolve_facts(readings, namings, wordings, config.relations)
        groups = group_rated(readings, config)
        add_statements(corpus, config, known_facts, wordings, sinks)
        add_rated(corpus, config, groups, sinks)
        finished["instructions"].add_made(make_instructions(config, known_facts, wordings))
        finished["rankings"].add_made(make_rankings(config, groups))
        counts = write_tables({"corpus": corpus, **finished}, job.outputs, readings)
    archived_model.write(config.checkpoint, job.outputs["checkpoint"])
    model_entries = archived_model.manifest_entries(config.checkpoint, list(counts))
    manifest = [*build_manifest(config, readings, counts), *model_entries]
    records.write_json(job.outputs["sources"], manifest)
    metrics = figures(counts, manifest)
    print_findings(readings, manifest)
    return metrics


def write_tables(
    builders: Mapping[str, Corpus | FinishedRows], outputs: Mapping[str, Path], readings: list[Reading]
) -> Counts:
    """Write the tables, reject duplicate rows, and return the number of rows by table and (source, split)."""
    origin = {reading.source: reading for reading in readings}

    def reject(source: str, row: str) -> None:
        origin[source].reject(row, "duplicate of an earlier row")

    return {table: builder.write(outputs[table], reject) for table, builder in builders.items()}


def print_findings(readings: list[Reading], manifest: list[dict[str, Any]]) -> None:
    """Print what a user should know about the sources: how files were read, rejected rows, unknown licences."""
    for reading in readings:
        for note in reading.describe_notes():
            print(f"source {reading.source}: {note}")
    rejected = sum(entry["rejected"] for entry in manifest)
    if rejected:
        print(f"{rejected} rows of the sources were rejected; data/ingest/rejected.jsonl gives the reasons")
    unknown = [entry["name"] for entry in manifest if entry["licence"] == UNKNOWN_LICENCE]
    if unknown:
        print(f"licence unknown: {', '.join(unknown)}")


def build_manifest(config: Config, readings: list[Reading], counts: Counts) -> list[dict[str, Any]]:
    """Return one entry for each source: its files, its rows read, used and rejected, and its rows by table."""
    return [
        {
            "name": source.name,
            "kind": source.kind,
            "licence": source.licence,
            "sha256": reading.sha256,
            "files": reading.files,
            "formats": dict(sorted(reading.formats.items())),
            "notes": reading.describe_notes(),
            "read": reading.rows_read,
            "used": reading.rows_read - reading.rejections,
            "rejected": reading.rejections,
            "rows": {table: sum(_select_counts(rows, source=source.name)) for table, rows in counts.items()},
        }
        for source, reading in zip(config.sources, readings, strict=True)
    ]


def figures(counts: Counts, manifest: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of the stage: rows by table and split, and rejected rows."""
    by_split = {f"{table}_{split}_rows": sum(_select_counts(rows, split=split))
                for table, rows in counts.items() for split in ("train", "heldout")}  # fmt: skip
    return {**by_split, "rejected_rows": sum(entry["rejected"] for entry in manifest)}


def _select_counts(
    rows: Counter[tuple[str, str]], source: str | None = None, split: str | None = None
) -> Iterator[int]:
    """Yield the numbers of rows of a source, or of a split."""
    for (row_source, row_split), count in rows.items():
        if source in (None, row_source) and split in (None, row_split):
            yield count
