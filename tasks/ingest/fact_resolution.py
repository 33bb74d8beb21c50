"""Resolves conflicts between the facts of several sources, and renames their entities."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.common.harness.job import StageError
from tasks.ingest import readers
from tasks.ingest.facts import Fact, Wordings
from tasks.ingest.reading import Reading


@dataclass(frozen=True)
class Naming:
    """Name and article of an entity in the tables; an empty name leaves the entity out."""

    name: str
    article: str
    why: str


def load_names(path: Path) -> dict[tuple[str, str], Naming]:
    """Return the namings by (kind, name in the sources); raise StageError if the file is missing or malformed."""
    if not path.is_file():
        raise StageError(f"{path} is missing; `ingest.names` must name the table of entity names.")
    try:
        _, rows = readers.read_csv(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise StageError(f"{path}: expected CSV in UTF-8, found something else ({error}); correct the file.") from error
    namings: dict[tuple[str, str], Naming] = {}
    for line, row in rows:
        if set(row) != {"kind", "found", "name", "article", "why"} or None in row.values():
            raise StageError(f"{path}, line {line}: expected the columns kind, found, name, article, why; found {row}.")
        naming = Naming(row["name"] or "", row["article"] or "", row["why"] or "")
        for found in filter(None, (row["found"], row["name"])):
            namings[row["kind"] or "", found] = naming
    return namings


def resolve_facts(
    readings: list[Reading], namings: dict[tuple[str, str], Naming], wordings: Wordings, relations: list[str]
) -> list[Fact]:
    """Return the facts with their entities renamed, sorted; a later source overrides an earlier one.

    All other facts are rejected in the reading of their source: unknown relations, overridden and ambiguous values.
    """
    origin = {reading.source: reading for reading in readings}
    resolved: dict[tuple[str, str, str], Fact] = {}
    for reading in readings:
        for fact in reading.facts:
            naming = namings.get((fact.kind, fact.entity), Naming(fact.entity, "", ""))
            renamed = replace(fact, entity=naming.name, article=naming.article)
            reason = _rejection_reason(fact, naming, wordings, relations)
            if reason:
                _reject(reading, fact, reason)
            else:
                if renamed.key in resolved:
                    earlier, value = resolved[renamed.key], fact.value or "left out"
                    _reject(origin[earlier.source], earlier, f"overridden by source {fact.source}: {value}")
                resolved[renamed.key] = renamed
    return sorted(_drop_ambiguous(resolved.values(), wordings, origin), key=lambda fact: fact.key)


def _rejection_reason(fact: Fact, naming: Naming, wordings: Wordings, relations: list[str]) -> str | None:
    if not naming.name:
        return f"the table of names leaves this entity out: {naming.why}"
    if fact.relation not in wordings.relations:
        return f"no wordings for the relation {fact.relation}"
    if fact.relation not in relations:
        return f"ingest.relations leaves out {fact.relation}"
    kind = wordings.relations[fact.relation].kind
    return None if fact.kind == kind else f"{fact.relation} is a relation of kind {kind}, not of kind {fact.kind}"


def _drop_ambiguous(facts: Iterable[Fact], wordings: Wordings, origin: dict[str, Reading]) -> list[Fact]:
    """Reject empty facts, and values of a unique relation that two entities share; return the rest."""
    holders: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.value:
            holders[fact.relation, fact.value].append(fact)
        else:
            _reject(origin[fact.source], fact, "empty value: leaves the fact out")
    kept: list[Fact] = []
    for (relation, value), sharing in holders.items():
        if len(sharing) == 1 or not wordings.relations[relation].unique:
            kept += sharing
            continue
        entities = ", ".join(fact.entity for fact in sharing)
        for fact in sharing:
            _reject(origin[fact.source], fact, f"{entities} share the {relation} {value}")
    return kept


def _reject(reading: Reading, fact: Fact, reason: str) -> None:
    reading.reject(f"{fact.kind}, {fact.entity}, {fact.relation}, {fact.value}", reason)
