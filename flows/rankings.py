"""Export of people's rankings: `bessemer rank export` writes the new rankings in the endpoint's store to a file.

Rows that were not exported yet become the next numbered Parquet file in the folder of the source of kind `rankings`,
with the columns described in `data/sources/README.md`. Existing files there are never changed.

Every ranking is exported exactly once, even if the export is interrupted at any point, by a power cut too. First the
store marks the rows of the export, which can no longer be withdrawn from then on; then the file is written to a scratch
folder and moved to its final path; then the store marks the export as finished. Each step is on disk before the next
one starts. The next export completes an unfinished one; the export number in the metadata of the files says whether its
file was written.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.feedback.judgements import FLAGS, Ranking
from serving.feedback.store import FEEDBACK_VARIABLE, FILE, Store
from tasks.common.locks import lock_file
from tasks.common.raw_params import read_params
from tasks.common.settings import BessemerError
from tasks.validate import checks

SOURCES = Path("data/sources")
SCRATCH_FOLDER = Path("data/.scratch/rankings-export")  # ignored by DVC
STORE_KEY, EXPORT_KEY = (
    b"bessemer.store",
    b"bessemer.export",
)  # metadata keys of a file: the store and export of its rows


@dataclass(frozen=True)
class Export:
    """An exported file: its path, its number of rankings, and how many were not exported for which reason."""

    path: Path
    rankings: int
    rejected: Mapping[str, int]


@dataclass(frozen=True)
class PendingRankings:
    """New rankings: how many would be exported, and how many would not for which reason."""

    rankings: int
    rejected: Mapping[str, int]


def store_folder(project: Path) -> Path:
    """Return the folder of the endpoint's store of rankings."""
    return Path(os.environ.get(FEEDBACK_VARIABLE) or project / "data" / "feedback").resolve()


def count_pending(project: Path) -> PendingRankings:
    """Count the rankings that an export would write, and those that it would leave out, without changing anything."""
    with _open_store(project) as store:
        if store is None:
            return PendingRankings(0, {})
        accepted, rejected = _filter_rankings(project, store, store.rankings_by_export(None))
        latest = _latest_rankings(accepted)
        unwritten = store.unfinished_export()
        unfinished = _latest_rankings(store.rankings_by_export(unwritten)) if unwritten is not None else []
        return PendingRankings(len(latest) + len(unfinished), rejected | _count_superseded(accepted, latest))


def export(project: Path) -> Export | None:
    """Write the new rankings to a file; None if there are none.

    If an earlier export was interrupted, this completes it and returns its file; the remaining rankings wait for the
    next call.
    """
    folder = rankings_folder(project)
    with _open_store(project) as store:
        if store is None:
            return None
        with _export_lock(store):
            accepted, rejected = _filter_rankings(project, store, store.rankings_by_export(None))
            number = store.unfinished_export()
            if number is None:
                if not accepted:
                    return None
                number = store.begin_export([ranking.number for ranking in accepted])
            taken = store.rankings_by_export(number)
            rows = _latest_rankings(taken)
            path = _find_or_write_file(project / SCRATCH_FOLDER, folder, store, number, rows)
            store.end_export(number)
            return Export(path, len(rows), rejected | _count_superseded(taken, rows)) if path else None


def rankings_folder(project: Path) -> Path:
    """Return the folder of the source of kind `rankings`; raise BessemerError if params.yaml lists none."""
    sources = read_params(project / "params.yaml").get("ingest", {}).get("sources", [])
    for source in sources:
        if isinstance(source, dict) and source.get("kind") == "rankings":
            return project / SOURCES / str(source["path"])
    raise BessemerError(
        "params.yaml lists no source of kind `rankings`, so a run would not read the exported file; add "
        "{name: people, kind: rankings, licence: ..., path: rankings} to ingest.sources."
    )


def exported_files(project: Path) -> list[Path]:
    """Return the files in the rankings folder that were written by an export."""
    return [path for path in _numbered_files(rankings_folder(project)) if _export_metadata(path)]


def _numbered_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.parquet"))


def _find_or_write_file(work: Path, folder: Path, store: Store, number: int, rows: Sequence[Ranking]) -> Path | None:
    """Return the file of an export, and write it if it does not exist yet.

    None if all of its rankings were withdrawn while the export started.
    """
    path = next((path for path in _numbered_files(folder) if _export_metadata(path) == _metadata(store, number)), None)
    if path is None and rows:
        path = folder / f"{_next_number(folder):06d}.parquet"
        _write_file(rows, path, work, store, number)
    return path


def _filter_rankings(project: Path, store: Store, rankings: Sequence[Ranking]) -> tuple[list[Ranking], dict[str, int]]:
    """Return the rankings to export, and how many others are rejected for which reason; those stay in the store.

    A ranking is rejected if `validate` would reject it (too many rejected rows would stop the run there), or if one of
    its answers is flagged. Only the last flag of a person on an answer counts.
    """
    last_flags = {
        (opinion.annotator, *_answer_key(opinion.prompt, opinion.response)): opinion.opinion
        for opinion in store.opinions()
        if opinion.opinion in FLAGS
    }
    flagged = {(prompt, response) for (_, prompt, response), opinion in last_flags.items() if opinion == "flag"}
    limits, accepted, reasons = _limits(project), [], Counter[str]()
    for ranking in rankings:
        if flagged.intersection(_answer_key(ranking.prompt, response) for response in ranking.responses):
            reasons["flagged answer"] += 1
        elif reason := checks.rejection_reason("rankings", checks.rankings_features(_row(store, ranking)), limits):
            reasons[reason] += 1
        else:
            accepted.append(ranking)
    return accepted, dict(reasons)


def _limits(project: Path) -> checks.Limits:
    """Return the limits that `validate` applies to rows."""
    section: Any = read_params(project / "params.yaml").get("validate")
    try:
        known = {name: section[name] for name in checks.Limits.model_fields if name in section}
        return checks.Limits.model_validate(known)
    except (TypeError, KeyError, ValidationError):
        raise BessemerError(
            "The section validate of params.yaml is invalid: run `bessemer plan` for the details."
        ) from None


def _latest_rankings(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Keep only the last ranking of each person for the same answers."""
    latest = {
        (ranking.annotator, json.dumps(ranking.prompt), *sorted(ranking.responses)): ranking for ranking in rankings
    }
    return sorted(latest.values(), key=lambda ranking: ranking.number)


def _count_superseded(rankings: Sequence[Ranking], latest: Sequence[Ranking]) -> dict[str, int]:
    """Return how many rankings were replaced by a later one of the same person, as a rejection reason."""
    count = len(rankings) - len(latest)
    return {"ranked again by the same person": count} if count else {}


def _answer_key(prompt: list[dict[str, str]], response: str) -> tuple[str, str]:
    return json.dumps(prompt, sort_keys=True), response


def _write_file(rankings: Sequence[Ranking], path: Path, work: Path, store: Store, number: int) -> None:
    """Write a file atomically: write and fsync it in the scratch folder, move it, fsync the target folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    texts = pa.list_(pa.string())
    schema = pa.schema(
        [("prompt", messages), ("responses", texts), ("ranks", pa.list_(pa.int32())), ("models", texts),
         ("annotator", pa.string())],
        metadata=_metadata(store, number),
    )  # fmt: skip
    rows = [_row(store, ranking) for ranking in rankings]
    work.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = work / path.name
    with scratch.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # without fsync of the folder a power cut may lose the file's entry
    finally:
        os.close(descriptor)


def _metadata(store: Store, number: int) -> dict[bytes, bytes]:
    """Return the metadata of an export's file."""
    return {STORE_KEY: store.id.encode(), EXPORT_KEY: str(number).encode()}


def _export_metadata(path: Path) -> dict[bytes, bytes]:
    """Return a file's export metadata; empty if it is not from an export or not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}
    return {key: found[key] for key in (STORE_KEY, EXPORT_KEY) if key in found}


def _row(store: Store, ranking: Ranking) -> dict[str, Any]:
    """Return a ranking as a row for `ingest`, with additional columns for the checks of `validate`."""
    return {
        "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in ranking.prompt],
        "responses": ranking.responses,
        "ranks": ranking.ranks,
        "models": ranking.models,
        "annotator": _pseudonym(store.id, ranking.annotator),
        "id": ranking.id,
        "source": "people",
        "split": "train",
        "scores": None,
        "scale": None,
    }


def _pseudonym(store: str, annotator: str) -> str:
    """Return a pseudonym: the annotator's own id would let a reader of the file submit rankings in their name."""
    return hashlib.sha256(f"{store} {annotator}".encode()).hexdigest()[:16]


def _next_number(folder: Path) -> int:
    """Return the highest file number in the folder plus 1."""
    numbers = [int(path.stem) for path in folder.glob("*.parquet") if path.stem.isdecimal()]
    return max(numbers, default=0) + 1


@contextmanager
def _open_store(project: Path) -> Iterator[Store | None]:
    """Yield the project's store; None if it does not exist yet. It is not created here."""
    folder = store_folder(project)
    if not (folder / FILE).is_file():
        yield None
        return
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()


def _export_lock(store: Store) -> AbstractContextManager[None]:
    """Return the lock that allows only one process at a time to export this store; entering it waits."""
    return lock_file(store.path.with_name("export.lock"), wait=True)
