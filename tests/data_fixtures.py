"""Shared fixtures for tests of ingest and validate: a copy of the sources, small configs, and a job."""

import importlib
import json
import shutil
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.common import tables
from tasks.common.harness.job import Job, stage_of
from tasks.common.settings import Checkpoints, Dtypes, Numerics, Parallel
from tasks.ingest import stage as ingest
from tasks.ingest.settings import Config as IngestConfig
from tasks.validate import stage as validate

SOURCES = Path(__file__).parents[1] / "data" / "sources"
FACTS = {
    "name": "facts",
    "kind": "files",
    "group": None,
    "licence": "MIT",
    "path": "smoke/facts.csv",
    "format": "csv",
    "table": "facts",
}
SMALLTALK = {
    **FACTS,
    "name": "smalltalk",
    "group": None,
    "path": "smalltalk.jsonl",
    "format": "jsonl",
    "table": "instructions",
}
PROSE = {**FACTS, "name": "stories", "group": "fiction", "path": "smoke/prose.txt", "format": "txt", "table": "corpus"}
RATINGS = {**FACTS, "name": "ratings", "path": "smoke/ratings.csv", "table": "ratings"}
PEOPLE = {"name": "people", "kind": "rankings", "licence": "MIT", "path": "rankings"}
CHAT = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello to you!"}]
RANKING = {"prompt": "Say hello.", "responses": ["Hello!", "What now?"], "ranks": [1, 2]}
INGEST: dict[str, Any] = {
    "salt": "test",
    "wordings": "wordings.yaml",
    "names": "names.csv",
    "relations": ["capital", "continent", "currency", "domain"],
    "paragraphs": 2,
    "heldout": {"entities": 0.25, "prose": 0.1, "rankings": 0.2},
    "ratings": {"group": 4, "scale": [-4, 4], "in_corpus": 1.0},
    "checkpoint": None,
    "sources": [FACTS, SMALLTALK, PROSE, RATINGS, PEOPLE],
}
VALIDATE: dict[str, Any] = {
    "max_text_characters": 1000,
    "max_message_characters": 500,
    "max_rejected_share": 0.5,
    "min_rows": {"corpus": 0, "instructions": 0, "rankings": 0},
    "min_heldout_questions": 0,
    "curate": {
        "code": [],
        **dict.fromkeys(("personal", "language", "quality", "evaluation", "exact_duplicates", "near_duplicates")),
    },
}


def import_great_expectations() -> None:
    """Import the library once: while it is imported it uses deprecated modules of the standard library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("great_expectations")


def ingest_config(**changes: Any) -> IngestConfig:
    """Return the small config of `ingest`, some of its keys changed."""
    return IngestConfig.model_validate({**INGEST, **changes})


def validate_config(**changes: Any) -> validate.Config:
    """Return generous limits, some of them changed."""
    return validate.Config.model_validate({**VALIDATE, **changes})


def copy_sources(folder: Path) -> Path:
    """Copy the project's sources into a folder of their own, without any exported rankings."""
    target = folder / "sources"
    shutil.copytree(SOURCES, target, ignore=shutil.ignore_patterns("*.parquet"))
    return target


def job(module: ModuleType, inputs: dict[str, Path], folder: Path) -> Job:
    """Return a job that writes into the folder; its inputs must be those that the stage declares."""
    assert set(inputs) == set(module.INPUTS)
    outputs = {name: folder / Path(path).name for name, path in module.OUTPUTS.items()}
    folder.mkdir(parents=True)
    return Job(
        stage=stage_of(module),
        key=None,
        inputs=inputs,
        outputs=outputs,
        seed=1,
        numerics=Numerics(
            device="cpu",
            threads=1,
            dtype=Dtypes(decoder="float32", encoder="float32"),
            attention="eager",
            compile="never",
            parallel=Parallel(processes=1, engine="data"),
        ),
        recipe="",
        checkpoints=Checkpoints(url="checkpoints", every_seconds=60.0),
    )


def ingest_into(folder: Path, copied: Path, **changes: Any) -> Path:
    """Run `ingest` on the sources and return the folder with its outputs."""
    ingest.run(ingest_config(**changes), job(ingest, {"sources": copied}, folder))
    return folder


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    rows: list[dict[str, Any]] = tables.read(folder / name).to_pylist()
    return rows


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest of `ingest` by source name."""
    return {entry["name"]: entry for entry in json.loads((folder / "sources.json").read_text(encoding="utf-8"))}


def rejections(folder: Path) -> list[dict[str, str]]:
    """Return the rows that `ingest` rejected, with their reasons."""
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
