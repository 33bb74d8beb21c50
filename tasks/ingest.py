"""Stage `ingest`: from the sources named in `params.yaml` to three tables (corpus, instructions, rankings).

Run as `python -m tasks.ingest`. Facts are an intermediate: sources give them, later sources override earlier ones, and
the wordings turn them into statements (corpus) and chats (instructions). Rated sentences become rankings; those of the
training split are prose as well. What enters no table is kept in `refused.jsonl` with its reason, so that the rows
read from each source are the rows used and the rows refused. `sources.json` holds an entry a source.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import Field, model_validator

from tasks.common import draw, stage, tables
from tasks.common.settings import Settings
from tasks.common.sources import archived_model, facts, readers
from tasks.common.sources.archived_model import Checkpoint
from tasks.common.sources.corpus import RATED, Corpus, RefusedFile, Teller
from tasks.common.sources.facts import Fact, Wordings
from tasks.common.sources.kinds import Source, SourcePath, read_source
from tasks.common.sources.reading import Rated, Reading
from tasks.common.stage import Job, StageError

NUMERICS = False  # no model computes here
INPUTS = {"sources": "data/sources"}
OUTPUTS = {
    "corpus": "data/ingest/corpus",
    "instructions": "data/ingest/instructions",
    "rankings": "data/ingest/rankings",
    "sources": "data/ingest/sources.json",
    "refused": "data/ingest/refused.jsonl",
    "checkpoint": "data/ingest/checkpoint",
}

Counts = dict[str, Counter[tuple[str, str]]]  # of each table, the rows by (source, split)


class Heldout(Settings):
    """Shares kept out of training, chosen by hash."""

    entities: float = Field(description="Share of entities that no question in training asks about", ge=0, le=0.9)
    prose: float = Field(description="Share of prose for perplexity", ge=0, le=0.5)
    rankings: float = Field(description="Share of rankings for the reward model's sheet", ge=0, le=0.5)


class Ratings(Settings):
    """How rated sentences become rankings."""

    group: int = Field(description="Sentences of one ranking", ge=2, le=16)
    scale: list[float] = Field(description="The two ends of the raters' scale", min_length=2, max_length=2)
    in_corpus: float = Field(description="Share of the training rankings whose sentences are prose as well", ge=0, le=1)


class Config(Settings):
    """Settings of `ingest`."""

    salt: str = Field(description="Word mixed into every hash; another one draws other splits", min_length=1)
    wordings: SourcePath = Field(description="File of wordings under data/sources/")
    names: SourcePath = Field(description="File of names of entities under data/sources/")
    relations: list[str] = Field(description="Relations to use, all of them in the wordings", min_length=1)
    paragraphs: int = Field(description="Paragraphs about each entity that join its statements", ge=0, le=16)
    heldout: Heldout
    ratings: Ratings
    checkpoint: Checkpoint | None = Field(
        description="A model that comes with the data, left in data/ingest/checkpoint; null for none"
    )
    sources: list[Source] = Field(description="Where data comes from; later facts override earlier", min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        twice = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if twice:
            raise ValueError(f"each source needs a name of its own, unlike {', '.join(twice)}")
        both = sorted({source.name for source in self.sources} & {str(source.group) for source in self.sources})
        if both:
            raise ValueError(
                f"a mixture could not tell whether {', '.join(both)} is a source or a group of sources: give "
                "the source another name, or its group"
            )
        if self.ratings.scale[0] >= self.ratings.scale[1]:
            raise ValueError(f"ratings.scale must rise, unlike {self.ratings.scale}")
        return self


@dataclass(frozen=True)
class Naming:
    """How an entity is called here; no name leaves it out."""

    name: str
    article: str
    why: str


def run(config: Config, job: Job) -> dict[str, Any]:
    """Read every source, build the three tables and the manifest."""
    from tqdm import tqdm

    folder = job.inputs["sources"]
    wordings = facts.load_wordings(folder / config.wordings)
    unknown = sorted(set(config.relations) - set(wordings.relations))
    if unknown:
        raise StageError(f"ingest.relations names {', '.join(unknown)}, but {config.wordings} has no wordings for it.")
    namings = load_names(folder / config.names)
    with (
        RefusedFile(job.outputs["refused"]) as refused,
        TemporaryDirectory(dir=job.outputs["corpus"].parent) as spilled,
    ):
        corpus = Corpus(Path(spilled, "documents"), config.salt, config.heldout.prose)
        tellers = {source.name: Teller(corpus, source.name, source.group, source.licence) for source in config.sources}
        readings = [Reading(source.name, source.licence, prose=tellers[source.name], refused=refused)
                    for source in config.sources]  # fmt: skip
        for source, reading in zip(tqdm(config.sources, desc="ingest", unit="source"), readings, strict=True):
            read_source(source, folder, reading)
        known = settle(readings, namings, wordings, config.relations)
        groups = group_rated(readings, config)
        add_statements(corpus, config, known, wordings, tellers)
        add_rated(corpus, config, groups, tellers)
        found = {
            "instructions": instructions(config, readings, known, wordings),
            "rankings": rankings(config, readings, groups),
        }
        counts = {"corpus": write_corpus(corpus, job.outputs["corpus"], readings)}
    for table, rows in found.items():
        tables.write(sorted(rows, key=lambda row: row["id"]), job.outputs[table], tables.schema(table))
        counts[table] = Counter((row["source"], row["split"]) for row in rows)
    archived_model.write(config.checkpoint, job.outputs["checkpoint"])
    manifest = [*describe(config, readings, counts), *archived_model.entries(config.checkpoint, list(counts))]
    stage.write_json(job.outputs["sources"], manifest)
    told = figures(counts, manifest)
    if told["refused_rows"]:
        print(f"{told['refused_rows']} rows of the sources were refused: data/ingest/refused.jsonl says why")
    return told


def load_names(path: Path) -> dict[tuple[str, str], Naming]:
    """Read the table of names: what sources call an entity, and its name and article here."""
    if not path.is_file():
        raise StageError(f"{path} is missing; `ingest.names` must name the table of entities' names.")
    try:
        _, rows = readers.read_csv(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise StageError(f"{path}: expected CSV in UTF-8, found something else ({error}); mend the file.") from error
    namings: dict[tuple[str, str], Naming] = {}
    for line, row in rows:
        if set(row) != {"kind", "found", "name", "article", "why"} or None in row.values():
            raise StageError(f"{path}, line {line}: expected the columns kind, found, name, article, why; found {row}.")
        naming = Naming(row["name"] or "", row["article"] or "", row["why"] or "")
        for found in filter(None, (row["found"], row["name"])):
            namings[row["kind"] or "", found] = naming
    return namings


def settle(
    readings: list[Reading], namings: dict[tuple[str, str], Naming], wordings: Wordings, relations: list[str]
) -> list[Fact]:
    """Return the facts that hold: named as here, the last source's word for each, no shared value where none may be."""
    origin = {reading.source: reading for reading in readings}
    held: dict[tuple[str, str, str], Fact] = {}
    for reading in readings:
        for fact in reading.facts:
            naming = namings.get((fact.kind, fact.entity), Naming(fact.entity, "", ""))
            named = replace(fact, entity=naming.name, article=naming.article)
            reason = _objection(fact, naming, wordings, relations)
            if reason:
                _refuse(reading, fact, reason)
            else:
                if named.key in held:
                    earlier, now = held[named.key], fact.value or "left out"
                    _refuse(origin[earlier.source], earlier, f"overridden by source {fact.source}: {now}")
                held[named.key] = named
    return sorted(_without_clashes(held.values(), wordings, origin), key=lambda fact: fact.key)


def _objection(fact: Fact, naming: Naming, wordings: Wordings, relations: list[str]) -> str | None:
    if not naming.name:
        return f"the table of names leaves this entity out: {naming.why}"
    if fact.relation not in wordings.relations:
        return f"no wordings for the relation {fact.relation}"
    if fact.relation not in relations:
        return f"ingest.relations leaves out {fact.relation}"
    kind = wordings.relations[fact.relation].kind
    return None if fact.kind == kind else f"{fact.relation} is told of kind {kind}, not of kind {fact.kind}"


def _without_clashes(found: Iterable[Fact], wordings: Wordings, origin: dict[str, Reading]) -> list[Fact]:
    """Leave out empty facts, and values that two entities share where a reader could not tell which is meant."""
    holders: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in found:
        if fact.value:
            holders[fact.relation, fact.value].append(fact)
        else:
            _refuse(origin[fact.source], fact, "empty on purpose: leaves the fact out")
    kept: list[Fact] = []
    for (relation, value), sharing in holders.items():
        if len(sharing) == 1 or not wordings.relations[relation].unique:
            kept += sharing
            continue
        everyone = ", ".join(fact.entity for fact in sharing)
        for fact in sharing:
            _refuse(origin[fact.source], fact, f"{everyone} share the {relation} {value}")
    return kept


def _refuse(reading: Reading, fact: Fact, reason: str) -> None:
    reading.refuse(f"{fact.kind}, {fact.entity}, {fact.relation}, {fact.value}", reason)


def group_rated(readings: list[Reading], config: Config) -> list[list[Rated]]:
    """Group the rated sentences of one collection and prompt by the order of their hashes.

    A text that came before is refused, under another prompt too: it could stand on both sides of the split.
    """
    seen: set[str] = set()
    collections: dict[tuple[str, str, str], list[Rated]] = defaultdict(list)
    for reading in readings:
        for rated in reading.rated:
            plain = " ".join(rated.text.lower().split())
            if not plain or plain in seen:
                reading.refuse(rated.text, "the same text came before" if plain else "an empty text")
                continue
            seen.add(plain)
            collections[rated.source, rated.group, rated.prompt].append(rated)
    groups: list[list[Rated]] = []
    for members in collections.values():
        order = sorted(members, key=lambda rated: draw.digest(config.salt, "group", rated.text))
        cut = [order[start : start + config.ratings.group] for start in range(0, len(order), config.ratings.group)]
        if len(cut) > 1 and len(cut[-1]) == 1:
            lonely = cut.pop()
            cut[-1] += lonely
        groups += cut
    return groups


def _group_split(group: list[Rated], config: Config) -> str:
    if group[0].word:
        return "train"
    return draw.split(config.heldout.rankings, config.salt, "ranking", *(rated.text for rated in group))


def add_statements(
    corpus: Corpus, config: Config, known: list[Fact], wordings: Wordings, tellers: Mapping[str, Teller]
) -> None:
    """Add statements about every entity."""
    rows = {row["id"]: row for row in facts.corpus_rows(known, wordings, config.paragraphs, config.salt)}
    corpus.statements({**row, **tellers[row["source"]].columns} for row in rows.values())


def add_rated(corpus: Corpus, config: Config, groups: list[list[Rated]], tellers: Mapping[str, Teller]) -> None:
    """Add the rated sentences of rankings that are not held out."""
    sentences = (group for group in groups if not group[0].word)
    training = (group for group in sentences if _group_split(group, config) == "train")
    for group in training:
        if draw.share(config.salt, "prose", group[0].text) < config.ratings.in_corpus:
            for rated in group:
                corpus.prose(rated.text, tellers[rated.source], RATED)


def write_corpus(corpus: Corpus, path: Path, readings: list[Reading]) -> Counter[tuple[str, str]]:
    """Write the table, refuse prose that came before, and count the rows of each (source, split)."""
    origin = {reading.source: reading for reading in readings}
    return corpus.write(path, lambda source, text: origin[source].refuse(text, "the same text came before"))


def instructions(
    config: Config, readings: list[Reading], known: list[Fact], wordings: Wordings
) -> list[dict[str, Any]]:
    """Return the chats about the facts and those that sources bring; only what differs is kept."""
    rows = {row["id"]: row for row in facts.instruction_rows(known, wordings, config.heldout.entities, config.salt)}
    return list(_with_given("instructions", rows, readings, config.heldout.entities, config.salt).values())


def rankings(config: Config, readings: list[Reading], groups: list[list[Rated]]) -> list[dict[str, Any]]:
    """Return a ranking for each group of rated sentences and those that sources bring."""
    rows: dict[str, dict[str, Any]] = {}
    for group in groups:
        first = group[0]
        identifier = draw.short_id("rankings", first.prompt, *(rated.text for rated in group))
        rows[identifier] = {
            "id": identifier,
            "prompt": [{"role": "user", "content": first.prompt}],
            "responses": [rated.text for rated in group],
            "ranks": None,
            "scores": [rated.scores for rated in group],
            "scale": config.ratings.scale,
            "annotators": max(len(rated.scores) for rated in group),
            "annotator": None,
            "models": [],
            "source": first.source,
            "split": _group_split(group, config),
        }
    return list(_with_given("rankings", rows, readings, config.heldout.rankings, config.salt).values())


def _with_given(
    table: str, rows: dict[str, dict[str, Any]], readings: list[Reading], heldout: float, salt: str
) -> dict[str, dict[str, Any]]:
    """Add finished rows of the sources; their split is drawn from the entity or the prompt unless a row states it.

    The entity's draw is that of the chats about facts, so that nothing is asked about on both sides. A row that states
    a split does so for all that are about the same.
    """
    given = [row for reading in readings for row in reading.rows.get(table, [])]
    stated = {row["entity"]: row["split"] for row in given if table == "instructions" and row["split"]}
    for reading in readings:
        for row in reading.rows.get(table, []):
            split = row["split"]
            if table == "instructions":
                about = ["entity", row["entity"]]
                split = split or stated.get(row["entity"])
            else:
                about = [table, *(turn["content"] for turn in row["prompt"])]
            if row["id"] in rows:
                reading.refuse(json.dumps(row, ensure_ascii=False), "the same row came before")
            rows.setdefault(row["id"], {**row, "split": split or draw.split(heldout, salt, *about)})
    return rows


def describe(config: Config, readings: list[Reading], counts: Counts) -> list[dict[str, Any]]:
    """Return the manifest: an entry a source: its files, its rows read, used and refused, its rows by table."""
    return [
        {
            "name": source.name,
            "kind": source.kind,
            "licence": source.licence,
            "sha256": reading.sha256,
            "files": reading.files,
            "read": reading.read,
            "used": reading.read - reading.refusals,
            "refused": reading.refusals,
            "rows": {table: sum(_of(found, source=source.name)) for table, found in counts.items()},
        }
        for source, reading in zip(config.sources, readings, strict=True)
    ]


def figures(counts: Counts, manifest: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the stage's figures: rows by table and split, and rows refused."""
    rows = {f"{table}_{where}_rows": sum(_of(found, split=where))
            for table, found in counts.items() for where in ("train", "heldout")}  # fmt: skip
    return {**rows, "refused_rows": sum(entry["refused"] for entry in manifest)}


def _of(found: Counter[tuple[str, str]], source: str | None = None, split: str | None = None) -> Iterator[int]:
    """Yield the numbers of rows of a source, or of a split."""
    return (count for (told_by, where), count in found.items() if source in (None, told_by) and split in (None, where))


if __name__ == "__main__":
    stage.main("tasks.ingest")
