"""People's rankings on their way into the next run: `bessemer rank export` freezes what is new in the endpoint's store.

New data enters the chain as a file: rows that no export has taken yet become the next numbered Parquet in the folder of
the source of kind `rankings`, with the columns that `data/sources/README.md` tells of. Files there are never changed.

No ranking is exported twice, and none is lost, wherever this is cut off, by a power cut too: first the store marks what
an export takes (which alone decides, and from then on nobody can take it back), then the file is written beside its
place and moved there, then the store notes that it is written. Each is on disk before the next begins. The next export
completes one without that last note; the number of the export in a file's metadata says whether it had come that far.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.feedback import FILE, VARIABLE, Store
from serving.judgements import FLAGS, Ranking
from tasks.common.settings import BessemerError, read_params
from tasks.common.validation import checks

SOURCES = Path("data/sources")
WORK = Path("data/.scratch/rankings-export")  # DVC does not look there
STORE_KEY, EXPORT_KEY = b"bessemer.store", b"bessemer.export"  # in a file's metadata: whose rows it holds


@dataclass(frozen=True)
class Export:
    """One frozen file: where it lies, how many rankings it holds, and why how many others were left out."""

    path: Path
    rankings: int
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Waiting:
    """What the store holds that no export has taken: how many rankings, and why how many others are left out."""

    rankings: int
    left_out: Mapping[str, int]


def store_folder(project: Path) -> Path:
    """Return the folder of the store that the endpoint of a project keeps rankings in."""
    return Path(os.environ.get(VARIABLE) or project / "data" / "feedback").resolve()


def waiting(project: Path) -> Waiting:
    """Count the rankings that wait to be exported, and those among the new ones that are left out; changes nothing."""
    with _store(project) as store:
        if store is None:
            return Waiting(0, {})
        good, left_out = _judged(project, store, store.rankings_of(None))
        last = _last_words(good)
        unwritten = store.unwritten_export()
        begun = _last_words(store.rankings_of(unwritten)) if unwritten is not None else []
        return Waiting(len(last) + len(begun), left_out | _replaced(good, last))


def export(project: Path) -> Export | None:
    """Freeze the rankings that are new and return their file; None where there are none.

    An export that was cut off is completed, and its file returned with the rest still waiting for the next call.
    """
    folder = rankings_folder(project)
    with _store(project) as store:
        if store is None:
            return None
        with _alone(store):
            good, left_out = _judged(project, store, store.rankings_of(None))
            number = store.unwritten_export()
            if number is None:
                if not good:
                    return None
                number = store.begin_export([ranking.number for ranking in good])
            taken = store.rankings_of(number)
            rows = _last_words(taken)
            path = _written(project / WORK, folder, store, number, rows)
            store.end_export(number)
            return Export(path, len(rows), left_out | _replaced(taken, rows)) if path else None


def rankings_folder(project: Path) -> Path:
    """Return the folder whose files the chain reads as rankings; BessemerError: params.yaml lists no such source."""
    sources = read_params(project / "params.yaml").get("ingest", {}).get("sources", [])
    for source in sources:
        if isinstance(source, dict) and source.get("kind") == "rankings":
            return project / SOURCES / str(source["path"])
    raise BessemerError(
        "params.yaml lists no source of kind `rankings`, so a run would not read what is exported; add "
        "{name: people, kind: rankings, licence: ..., path: rankings} to ingest.sources."
    )


def exported(project: Path) -> list[Path]:
    """Return the files that exports have made here, whoever's rankings they hold."""
    return [path for path in _numbered(rankings_folder(project)) if _origin(path)]


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.parquet"))


def _written(work: Path, folder: Path, store: Store, number: int, rows: Sequence[Ranking]) -> Path | None:
    """Return the file of an export that the store has begun, and write it where it is not there yet.

    There is none where all of its rankings were taken back in that very moment.
    """
    path = next((path for path in _numbered(folder) if _origin(path) == _metadata(store, number)), None)
    if path is None and rows:
        path = folder / f"{_next_number(folder):06d}.parquet"
        _write(rows, path, work, store, number)
    return path


def _judged(project: Path, store: Store, rankings: Sequence[Ranking]) -> tuple[list[Ranking], dict[str, int]]:
    """Return the rankings that a run can learn from, and why how many others are left out: they wait on.

    Left out is what `validate` would refuse (too much of it would stop the run there), and what holds an answer that
    somebody flags, as long as it does: of one person's flags on an answer the last one counts.
    """
    last = {
        (opinion.annotator, *_answer(opinion.prompt, opinion.response)): opinion.opinion
        for opinion in store.opinions()
        if opinion.opinion in FLAGS
    }
    flagged = {(prompt, response) for (_, prompt, response), opinion in last.items() if opinion == "flag"}
    limits, good, reasons = _limits(project), [], Counter[str]()
    for ranking in rankings:
        if flagged.intersection(_answer(ranking.prompt, response) for response in ranking.responses):
            reasons["flagged answer"] += 1
        elif reason := checks.objection("rankings", checks.rankings_features(_row(store, ranking)), limits):
            reasons[reason] += 1
        else:
            good.append(ranking)
    return good, dict(reasons)


def _limits(project: Path) -> checks.Limits:
    """Return what `validate` holds rows to."""
    section: Any = read_params(project / "params.yaml").get("validate")
    try:
        return checks.Limits.model_validate({name: section[name] for name in checks.Limits.model_fields})
    except (TypeError, KeyError, ValidationError):
        raise BessemerError("The section validate of params.yaml is not sound: `bessemer plan` says why.") from None


def _last_words(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Keep, where a person ranked the same answers again, the last one."""
    said = {
        (ranking.annotator, json.dumps(ranking.prompt), *sorted(ranking.responses)): ranking for ranking in rankings
    }
    return sorted(said.values(), key=lambda ranking: ranking.number)


def _replaced(rankings: Sequence[Ranking], last: Sequence[Ranking]) -> dict[str, int]:
    """Return how many rankings the same person's later ones took the place of, as a reason to leave them out."""
    count = len(rankings) - len(last)
    return {"ranked again by the same person": count} if count else {}


def _answer(prompt: list[dict[str, str]], response: str) -> tuple[str, str]:
    return json.dumps(prompt, sort_keys=True), response


def _write(rankings: Sequence[Ranking], path: Path, work: Path, store: Store, number: int) -> None:
    """Write a file whole: beside its place first, on the disk, then moved there, on the disk again."""
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
    opened = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(opened)  # the folder's entry, without which a power cut leaves no file of that name
    finally:
        os.close(opened)


def _metadata(store: Store, number: int) -> dict[bytes, bytes]:
    """Return what a file says of the export that it is from."""
    return {STORE_KEY: store.id.encode(), EXPORT_KEY: str(number).encode()}


def _origin(path: Path) -> dict[bytes, bytes]:
    """Return what a file says of the export that it is from; nothing, where it is another's or not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}
    return {key: found[key] for key in (STORE_KEY, EXPORT_KEY) if key in found}


def _row(store: Store, ranking: Ranking) -> dict[str, Any]:
    """Return a ranking as `ingest` reads it; columns beyond those of a file are for checks of it."""
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
    """Return who judged, without what would let a reader of the file speak for them at the endpoint."""
    return hashlib.sha256(f"{store} {annotator}".encode()).hexdigest()[:16]


def _next_number(folder: Path) -> int:
    """Return the number after the highest that a file in the folder has."""
    numbers = [int(path.stem) for path in folder.glob("*.parquet") if path.stem.isdecimal()]
    return max(numbers, default=0) + 1


@contextmanager
def _store(project: Path) -> Iterator[Store | None]:
    """Yield the project's store, None where nobody has ranked anything yet: none is made."""
    folder = store_folder(project)
    if not (folder / FILE).is_file():
        yield None
        return
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Hold off other exports of this store; the kernel takes the lock back however its holder ends."""
    with store.path.with_name("export.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
