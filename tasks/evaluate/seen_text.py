"""Whether the text of an item occurs in the training rows: seen, nearly seen, or unseen.

An item's text is its prompt: all turns but the reply. It is seen if a training prompt has the same words, and nearly
seen if the Jaccard index of its word 3-grams with those of a training prompt is at least 0.6, the default threshold of
near-duplicates in `validate`. Training rows are read in batches; memory holds the n-grams of the items only.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tasks.common import tables
from tasks.common.text.words import words

SEEN, NEARLY, UNSEEN = "seen", "nearly", "unseen"
SHINGLE_WORDS = 3
MIN_JACCARD = 0.6
Turns = Sequence[Mapping[str, str]]
Shingles = frozenset[tuple[str, ...]]


def classify(prompts: Sequence[Turns], *trained: Path) -> list[str]:
    """Return seen, nearly or unseen for each prompt, by the training rows of tables of conversations or rankings."""
    texts = [prompt_words(prompt) for prompt in prompts]
    found: dict[tuple[str, ...], str] = {}
    index = ShingleIndex(texts)
    for prompt in (prompt for table in trained for prompt in _training_prompts(table)):
        if prompt in index.shingles:
            found[prompt] = SEEN
        for text in index.similar(prompt):
            found.setdefault(text, NEARLY)
            index.remove(text)
    return [found.get(text, UNSEEN) for text in texts]


def _training_prompts(table: Path) -> Iterator[tuple[str, ...]]:
    """Yield the words of each prompt in a table's training rows."""
    rankings = "prompt" in tables.schema_of(table).names
    column = "prompt" if rankings else "messages"
    for batch in tables.batches(table, "train", [column, "split"]):
        for turns in batch[column].to_pylist():
            yield prompt_words(turns if rankings else turns[:-1])


def prompt_words(turns: Turns) -> tuple[str, ...]:
    """Return the words of a prompt in lower case without punctuation."""
    return tuple(words(" ".join(turn["content"] for turn in turns)))


def shingles_of(text: Sequence[str]) -> Shingles:
    """Return a text's word n-grams; a shorter text is one n-gram."""
    count = max(len(text) - SHINGLE_WORDS + 1, 1)
    return frozenset(tuple(text[start : start + SHINGLE_WORDS]) for start in range(count))


class ShingleIndex:
    """Texts by their n-grams. A text that was found is removed from the search, so that common n-grams stay cheap."""

    def __init__(self, texts: Iterable[tuple[str, ...]]) -> None:
        self.shingles = {text: shingles_of(text) for text in texts}
        self._texts: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for text, found in self.shingles.items():
            for shingle in found:
                self._texts.setdefault(shingle, set()).add(text)

    def similar(self, text: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the texts whose Jaccard index with a text is at least MIN_JACCARD, in a stable order."""
        own = shingles_of(text)
        shared: Counter[tuple[str, ...]] = Counter()
        for shingle in own:
            shared.update(self._texts.get(shingle, ()))
        return sorted(
            other
            for other, count in shared.items()
            if count >= MIN_JACCARD * (len(own) + len(self.shingles[other]) - count)
        )

    def remove(self, text: tuple[str, ...]) -> None:
        """Leave a text out of the search from now on."""
        for shingle in self.shingles[text]:
            self._texts[shingle].discard(text)
