"""One side of `benchmarks/curation.py`: plant near-duplicates, search for them, count.

Run as `python -m benchmarks.curation_run REQUEST`. Only the search, from texts to verdicts, is timed, in CPU time.
Precision is then computed with the exact Jaccard index of the shingles.
"""

import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from tasks.common.harness.records import write_json
from tasks.common.text.words import words
from tasks.ingest import archives, readers
from tasks.ingest.reading import Reading
from tasks.validate.near_duplicates import DuplicateFinder, NearDuplicates, max_band_rows

EDIT_SHARE = 0.05  # of a paragraph's words that are changed, dropped or appended
COPIES_PER_PARAGRAPH = 0.1  # copies per paragraph
BATCH = 10_000
KINDS = ("changed", "dropped", "appended")


def main() -> None:
    """Run the requested side and write its figures."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # before Rensa starts its threads: the figures are per core
    request = harness.read_request()
    sys.path.append(request["peers"])
    settings = NearDuplicates(**request["settings"])
    texts = paragraphs(Path(request["archive"]), request["members"], settings)[: request["paragraphs"]]
    planted = plant(texts)
    everything = [*texts, *planted]
    search = {"ours": ours, "peer": peer}[request["side"]]
    bands, rows = {"ours": our_bands, "peer": peer_bands}[request["side"]](settings)
    search(texts[:10], settings)  # loads the libraries before the timed run
    started = time.process_time()
    removed = search(everything, settings)
    seconds = time.process_time() - started
    megabytes = sum(len(text.encode()) for text in everything) / 1e6
    found = removed[len(texts) :]
    figures = {
        "bands": bands, "rows": rows, "megabytes": megabytes, "documents": len(everything), "planted": len(planted),
        "seconds": seconds,
        "megabytes_per_second": megabytes / seconds,
        "recall": float(np.mean(found)),
        "recall_by_kind": {kind: float(np.mean(found[number::3])) for number, kind in enumerate(KINDS)},
        "precision": precision(everything, np.flatnonzero(removed).tolist(), settings),
    }  # fmt: skip
    write_json(Path(request["result"]), figures)


def paragraphs(archive: Path, members: str, settings: NearDuplicates) -> list[str]:
    """Return the unique paragraphs of the speeches that are long enough to be checked after an edit."""
    prose: list[str] = []
    readers.read_speeches(archives.read_members("speeches", archive, members), Reading("speeches", "MIT", prose=prose))
    length_margin = 1 + EDIT_SHARE
    return [text for text in dict.fromkeys(prose) if len(words(text)) > settings.min_words * length_margin]


def plant(texts: Sequence[str]) -> list[str]:
    """Return edited copies of some texts; the kinds of edit take turns."""
    generator = random.Random(1)
    vocabulary = sorted({word for text in texts for word in text.split()})
    chosen = generator.sample(range(len(texts)), round(COPIES_PER_PARAGRAPH * len(texts)))
    copies = []
    for turn, number in enumerate(chosen):
        own = texts[number].split()
        count = max(round(EDIT_SHARE * len(own)), 1)
        positions = set(generator.sample(range(len(own)), count))
        kind = KINDS[turn % 3]
        if kind == "changed":
            own = [generator.choice(vocabulary) if place in positions else word for place, word in enumerate(own)]
        elif kind == "dropped":
            own = [word for place, word in enumerate(own) if place not in positions]
        else:
            own += generator.choices(vocabulary, k=count)
        copies.append(" ".join(own))
    return copies


def ours(texts: Sequence[str], settings: NearDuplicates) -> Any:
    """Return a mask of the texts that `validate` removes."""
    duplicates = DuplicateFinder(None, settings)
    for start in range(0, len(texts), BATCH):
        duplicates.add([(words(text), False) for text in texts[start : start + BATCH]])
    return duplicates.find_redundant()[1]


def our_bands(settings: NearDuplicates) -> tuple[int, int]:
    """Return our number of LSH bands and of rows per band."""
    rows = max_band_rows(settings.min_jaccard, settings.permutations)
    return settings.permutations // rows, rows


def peer_bands(settings: NearDuplicates) -> tuple[int, int]:
    """Return datasketch's own number of LSH bands and of rows per band."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=settings.min_jaccard, num_perm=settings.permutations)
    return index.b, index.r


def peer(texts: Sequence[str], settings: NearDuplicates) -> Any:
    """Return a mask of the texts with an earlier match in datasketch's index."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=settings.min_jaccard, num_perm=settings.permutations)
    removed = np.zeros(len(texts), bool)
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=settings.permutations, seed=1)
        sketch.update_batch([shingle.encode() for shingle in shingles(text, settings)])
        removed[number] = bool(index.query(sketch))
        if not removed[number]:
            index.insert(number, sketch)
    return removed


def shingles(text: str, settings: NearDuplicates) -> set[str]:
    """Return a text's set of word shingles."""
    own = words(text)
    return {" ".join(own[start : start + settings.shingle]) for start in range(len(own) - settings.shingle + 1)}


def precision(texts: Sequence[str], removed: Sequence[int], settings: NearDuplicates) -> float:
    """Return the share of removed texts that have another text with a Jaccard index of at least `min_jaccard`."""
    holders: dict[str, list[int]] = defaultdict(list)
    sizes = []
    for number, text in enumerate(texts):
        own = shingles(text, settings)
        sizes.append(len(own))
        for shingle in own:
            holders[shingle].append(number)
    right = 0
    for number in removed:
        common = Counter(other for shingle in shingles(texts[number], settings) for other in holders[shingle])
        size = common.pop(number)
        right += any(same / (size + sizes[other] - same) >= settings.min_jaccard for other, same in common.items())
    return right / len(removed) if removed else 1.0


if __name__ == "__main__":
    main()
