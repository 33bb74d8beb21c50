"""One side of `benchmarks/curation.py` in a process of its own: plant near-duplicates, look for them, count.

Started as `python -m benchmarks.curation_run REQUEST`. Only what lies between the texts and the verdicts is timed, by
the processor's time; what is right is then counted with the plain Jaccard index of the shingles.
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
from tasks.common.sources import archives, readers
from tasks.common.sources.reading import Reading
from tasks.common.stage import write_json
from tasks.common.validation.near_duplicates import Duplicates, NearDuplicates, rows_of_a_band
from tasks.common.validation.words import words

SHARE = 0.05  # of a paragraph's words are changed, dropped or appended
PLANTED = 0.1  # copies for each paragraph
BATCH = 10_000
KINDS = ("changed", "dropped", "appended")


def main() -> None:
    """Answer the request."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # before Rensa starts its threads: what is asked is what one core does
    request = harness.read_request()
    sys.path.append(request["peers"])
    settings = NearDuplicates(**request["settings"])
    texts = paragraphs(Path(request["archive"]), request["members"], settings)[: request["paragraphs"]]
    planted = plant(texts)
    everything = [*texts, *planted]
    search = {"ours": ours, "peer": peer}[request["side"]]
    bands, rows = {"ours": our_bands, "peer": peer_bands}[request["side"]](settings)
    search(texts[:10], settings)  # so that libraries are loaded before the clock runs
    started = time.process_time()
    gone = search(everything, settings)
    seconds = time.process_time() - started
    megabytes = sum(len(text.encode()) for text in everything) / 1e6
    found = gone[len(texts) :]
    figures = {
        "bands": bands, "rows": rows, "megabytes": megabytes, "documents": len(everything), "planted": len(planted),
        "seconds": seconds,
        "megabytes_per_second": megabytes / seconds,
        "recall": float(np.mean(found)),
        "recall_by_kind": {kind: float(np.mean(found[number::3])) for number, kind in enumerate(KINDS)},
        "precision": precision(everything, np.flatnonzero(gone).tolist(), settings),
    }  # fmt: skip
    write_json(Path(request["result"]), figures)


def paragraphs(archive: Path, members: str, settings: NearDuplicates) -> list[str]:
    """Return the different paragraphs of the speeches that are long enough for a copy to be found."""
    told: list[str] = []
    readers.speeches(archives.members("speeches", archive, members), Reading("speeches", "MIT", prose=told))
    longest_edit = 1 + SHARE
    return [text for text in dict.fromkeys(told) if len(words(text)) > settings.fewest_words * longest_edit]


def plant(texts: Sequence[str]) -> list[str]:
    """Return edited copies of some texts; the kinds of edit take turns."""
    generator = random.Random(1)
    vocabulary = sorted({word for text in texts for word in text.split()})
    chosen = generator.sample(range(len(texts)), round(PLANTED * len(texts)))
    copies = []
    for turn, number in enumerate(chosen):
        own = texts[number].split()
        count = max(round(SHARE * len(own)), 1)
        places = set(generator.sample(range(len(own)), count))
        kind = KINDS[turn % 3]
        if kind == "changed":
            own = [generator.choice(vocabulary) if place in places else word for place, word in enumerate(own)]
        elif kind == "dropped":
            own = [word for place, word in enumerate(own) if place not in places]
        else:
            own += generator.choices(vocabulary, k=count)
        copies.append(" ".join(own))
    return copies


def ours(texts: Sequence[str], settings: NearDuplicates) -> Any:
    """Return which texts are to go, as `validate` decides."""
    duplicates = Duplicates(None, settings)
    for start in range(0, len(texts), BATCH):
        duplicates.add([(words(text), False) for text in texts[start : start + BATCH]])
    return duplicates.redundant()[1]


def our_bands(settings: NearDuplicates) -> tuple[int, int]:
    """Return how many bands of how many rows our signatures are cut into."""
    rows = rows_of_a_band(settings.jaccard, settings.permutations)
    return settings.permutations // rows, rows


def peer_bands(settings: NearDuplicates) -> tuple[int, int]:
    """Return the bands that datasketch chooses by itself."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=settings.jaccard, num_perm=settings.permutations)
    return index.b, index.r


def peer(texts: Sequence[str], settings: NearDuplicates) -> Any:
    """Return which texts have one before them in datasketch's index."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=settings.jaccard, num_perm=settings.permutations)
    gone = np.zeros(len(texts), bool)
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=settings.permutations, seed=1)
        sketch.update_batch([shingle.encode() for shingle in shingles(text, settings)])
        gone[number] = bool(index.query(sketch))
        if not gone[number]:
            index.insert(number, sketch)
    return gone


def shingles(text: str, settings: NearDuplicates) -> set[str]:
    """Return a text's different runs of words."""
    own = words(text)
    return {" ".join(own[start : start + settings.shingle]) for start in range(len(own) - settings.shingle + 1)}


def precision(texts: Sequence[str], gone: Sequence[int], settings: NearDuplicates) -> float:
    """Return the share of what is gone that has another text with a Jaccard index at or above the threshold."""
    holders: dict[str, list[int]] = defaultdict(list)
    sizes = []
    for number, text in enumerate(texts):
        own = shingles(text, settings)
        sizes.append(len(own))
        for shingle in own:
            holders[shingle].append(number)
    right = 0
    for number in gone:
        common = Counter(other for shingle in shingles(texts[number], settings) for other in holders[shingle])
        size = common.pop(number)
        right += any(same / (size + sizes[other] - same) >= settings.jaccard for other, same in common.items())
    return right / len(gone) if gone else 1.0


if __name__ == "__main__":
    main()
