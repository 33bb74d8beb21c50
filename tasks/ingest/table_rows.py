"""Makes rows of the three tables, with their split, from facts and rated texts."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from tasks.common import stable_hash
from tasks.ingest import facts
from tasks.ingest.corpus import RATED_RANK, Corpus, ProseSink
from tasks.ingest.facts import Fact, Wordings
from tasks.ingest.reading import RatedText, Reading
from tasks.ingest.settings import Config


def group_rated(readings: list[Reading], config: Config) -> list[list[RatedText]]:
    """Group the rated texts of each collection and prompt, in the order of their hashes.

    A repeated text is rejected, even with another prompt, because it could get into both splits.
    """
    seen: set[str] = set()
    collections: dict[tuple[str, str, str], list[RatedText]] = defaultdict(list)
    for reading in readings:
        for rated in reading.rated:
            normalized = " ".join(rated.text.lower().split())
            if not normalized or normalized in seen:
                reading.reject(rated.text, "duplicate of an earlier row" if normalized else "an empty text")
                continue
            seen.add(normalized)
            collections[rated.source, rated.group, rated.prompt].append(rated)
    groups: list[list[RatedText]] = []
    for members in collections.values():
        order = sorted(members, key=lambda rated: stable_hash.digest(config.salt, "group", rated.text))
        size = config.ratings.group
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        if len(parts) > 1 and len(parts[-1]) == 1:  # a ranking needs two responses
            single = parts.pop()
            parts[-1] += single
        groups += parts
    return groups


def _group_split(group: list[RatedText], config: Config) -> str:
    if group[0].word:
        return "train"
    return stable_hash.split(config.heldout.rankings, config.salt, "ranking", *(rated.text for rated in group))


def add_statements(
    corpus: Corpus, config: Config, known_facts: list[Fact], wordings: Wordings, sinks: Mapping[str, ProseSink]
) -> None:
    """Add the statements and paragraphs of all facts to the corpus."""
    rows = {row["id"]: row for row in facts.make_corpus_rows(known_facts, wordings, config.paragraphs, config.salt)}
    corpus.add_statements({**row, **sinks[row["source"]].columns} for row in rows.values())


def add_rated(corpus: Corpus, config: Config, groups: list[list[RatedText]], sinks: Mapping[str, ProseSink]) -> None:
    """Add the sentences of a share of the training rankings (`ratings.in_corpus`) to the corpus."""
    sentences = (group for group in groups if not group[0].word)
    training = (group for group in sentences if _group_split(group, config) == "train")
    for group in training:
        if stable_hash.uniform(config.salt, "prose", group[0].text) < config.ratings.in_corpus:
            for rated in group:
                corpus.add_prose(rated.text, sinks[rated.source], RATED_RANK)


def make_instructions(config: Config, known_facts: list[Fact], wordings: Wordings) -> list[dict[str, Any]]:
    """Return the distinct chats about the facts."""
    chats = facts.make_instruction_rows(known_facts, wordings, config.heldout.entities, config.salt)
    return list({row["id"]: row for row in chats}.values())


def make_rankings(config: Config, groups: list[list[RatedText]]) -> list[dict[str, Any]]:
    """Return a ranking for each group of rated texts."""
    rows: dict[str, dict[str, Any]] = {}
    for group in groups:
        first = group[0]
        identifier = stable_hash.short_id("rankings", first.prompt, *(rated.text for rated in group))
        rows[identifier] = {
            "id": identifier,
            "prompt": [{"role": "user", "content": first.prompt}],
            "responses": [rated.text for rated in group],
            "ranks": None,
            "scores": [rated.scores for rated in group],
            "scale": config.ratings.scale,
            "annotators": max(len(rated.scores) for rated in group),
            "annotator": None,
            "models": [],
            "source": first.source,
            "split": _group_split(group, config),
        }
    return list(rows.values())
