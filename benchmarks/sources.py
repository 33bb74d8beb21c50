"""Sources of many bytes and of many files through `ingest`: MB and files per second, and peak memory.

Run as `make bench-sources` or `python -m benchmarks sources`. The texts are pieces of a long text of random words, with
a number, so that none is a duplicate. Every source is read by the stage's command in a scratch project, tables and
manifest included.
"""

import gzip
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import data, harness
from benchmarks.harness import Figures, Measurements, Row
from tasks.common.defaults import read_settings
from tasks.common.settings import ENTRY_SECTIONS

PROFILE = harness.ROOT / "profiles" / "smoke.yaml"
BYTES, TRIAL_BYTES = 200_000_000, 2_000_000
FILES, TRIAL_FILES = 100_000, 1000
GROWTH_FACTOR = 4
VOCABULARY, POOL_WORDS = 20_000, 500_000
WORDS_PER_TEXT = (40, 300)


def check() -> None:
    """Nothing is needed."""


def threads() -> int:
    """Return 1: the figures are per core."""
    return 1


def measure(*, trial: bool) -> Measurements:
    """Measure each kind of source at its size, and memory at that size against a quarter of it."""
    size, files = (TRIAL_BYTES, TRIAL_FILES) if trial else (BYTES, FILES)
    shortest, longest = WORDS_PER_TEXT
    note = f"{size / 1e6:,.0f} MB in one file; {files:,} files of {shortest} to {longest} words"
    measured = Measurements(notes=[note])
    for name, target in (("texts.jsonl", ">= 20"), ("texts.json", None), ("texts.csv", None), ("texts.jsonl.gz", None)):
        add_file(measured, name, size, target)
    for name in ("chats.jsonl", "pairs.jsonl"):
        add_file(measured, name, size, ">= 20")
    add_folder(measured, files)
    return measured


def add_file(measured: Measurements, name: str, size: int, target: str | None) -> None:
    """Add the rate and the growth of memory of one file."""
    small, large = (run(partial(write_file, size=part), name) for part in (size // GROWTH_FACTOR, size))
    rate = large["written"] / 1e6 / large["cpu_seconds"]
    measured.rows.append(Row(f"{name}, start of the process included", rate, "MB/s per core", target=target))
    add_memory(measured, name, small, large)


def add_folder(measured: Measurements, files: int) -> None:
    """Add the rate and the growth of memory of a folder of small files."""
    small, large = (run(partial(write_folder, count=part), "pages") for part in (files // GROWTH_FACTOR, files))
    rate = files / large["cpu_seconds"]
    what = "a folder of small text files, start of the process included"
    measured.rows.append(Row(what, rate, "files/s per core", target=">= 2000"))
    add_memory(measured, "the folder", small, large)


def add_memory(measured: Measurements, name: str, small: Figures, large: Figures) -> None:
    """Add the ratio of the peaks."""
    ratio = large["peak_memory_bytes"] / small["peak_memory_bytes"]
    what = f"{name}: peak memory at {GROWTH_FACTOR}x the size over peak at 1x"
    measured.rows.append(Row(what, ratio, "ratio", target="<= 1.15"))
    measured.notes.append(
        f"{name}: {large['seconds']:.1f} s by the clock, {large['peak_memory_bytes'] / 1e6:,.0f} MB of memory"
    )


def run(write: Callable[[Path], int], path: str) -> Figures:
    """Read a source in a scratch project; return what `write` returned, the seconds and the peak memory."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        workdir = Path(scratch)
        for name in ("tasks", "serving"):
            shutil.copytree(harness.ROOT / name, workdir / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(harness.ROOT / "requirements.lock", workdir)
        source = workdir / "data/sources" / path
        source.parent.mkdir(parents=True)
        written = write(source)
        write_params(workdir / "params.yaml", path)
        figures = data.step(workdir, "tasks.ingest")
        log = json.loads(next(workdir.glob("runs/*/ingest.json")).read_text(encoding="utf-8"))
        (entry,) = json.loads((workdir / "data/ingest/sources.json").read_text(encoding="utf-8"))
        if entry["rejected"]:
            raise harness.BenchmarkError(f"{entry['rejected']} rows of {path} were rejected, expected none")
        return {**figures, "written": written, "peak_memory_bytes": log["peak_memory_bytes"]}


def write_params(path: Path, source: str) -> None:
    """Write the smoke profile with one source and without entries, which would need other tables too."""
    from ruamel.yaml import YAML

    params: dict[str, Any] = read_settings(PROFILE)
    params |= {section: {} for section in ENTRY_SECTIONS}
    params |= {"ingest": {"sources": [{"kind": "files", "path": source}]}, "evaluations": {}, "compare": {"gates": []}}
    params["package"] = {"chat": "models/any"}
    params["tokenize"]["tokenizer"] = {"name": "from", "path": "models/any"}  # pairs alone train no tokenizer
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(params, file)


def texts(size: int) -> Iterator[str]:
    """Yield texts with a total of about `size` bytes."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvwé", k=draw.randrange(2, 10))) for _ in range(VOCABULARY)]
    pool = draw.choices(words, k=POOL_WORDS)
    written = number = 0
    while written < size:
        start, count = draw.randrange(POOL_WORDS - WORDS_PER_TEXT[1]), draw.randrange(*WORDS_PER_TEXT)
        text = f"{number}. {' '.join(pool[start : start + count])}"
        written, number = written + len(text.encode()) + 1, number + 1
        yield text


def write_file(path: Path, size: int) -> int:
    """Write a file of texts, conversations or pairs in the format of its name; return the characters of its content."""
    rows = (make_row(path.name.partition(".")[0], text) for text in texts(size))
    opener: Callable[..., Any] = partial(gzip.open, compresslevel=1) if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        return sum(map(file.write, lines(rows, path.suffix)))


def lines(rows: Iterator[dict[str, Any]], suffix: str) -> Iterator[str]:
    """Yield the lines of a file of rows: CSV, a pretty-printed array, or JSON lines."""
    if suffix == ".csv":
        yield "text\n"
        yield from (f'"{row["text"]}"\n' for row in rows)
    elif suffix == ".json":
        yield from (f"{',' if number else '['}\n{json.dumps(row, indent=1)}" for number, row in enumerate(rows))
        yield "]"
    else:
        yield from (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_row(kind: str, text: str) -> dict[str, Any]:
    """Return a text as a row of a document, a conversation or a pair."""
    question, answer = text[: len(text) // 3], text[len(text) // 3 :].strip() or "yes"
    if kind == "texts":
        return {"text": text}
    if kind == "pairs":
        return {"prompt": question, "chosen": answer, "rejected": answer[::-1]}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_folder(path: Path, count: int) -> int:
    """Write a folder of text files, a thousand in each of its folders; return how many characters."""
    written = 0
    for number, text in zip(range(count), texts(count * 10_000), strict=False):
        folder = path / f"{number // 1000:04}"
        folder.mkdir(parents=True, exist_ok=True)
        written += (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return written
