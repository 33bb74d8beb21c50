"""The lineage of the graph's entries: from their links before a run, from their records after it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tasks.common.harness.job import Link

DATA_STAGES = ("ingest", "validate", "tokenize")


def entries_by_folder(links: Sequence[Link]) -> dict[str, Link]:
    """Return the entry that produces each model folder; evaluations produce none."""
    return {link.folder: link for link in links if link.stage != "evaluate"}


def needed_stages(links: Sequence[Link]) -> frozenset[str]:
    """Return which of the stages without entries the entries need: those of the data, and `compare`.

    Whatever trains or evaluates reads data. An export alone reads none, except for a model that `ingest` downloads.
    """
    if any(link.stage != "quantize" for link in links):
        evaluates = any(link.stage == "evaluate" for link in links)
        return frozenset({*DATA_STAGES, *(["compare"] if evaluates else [])})
    return frozenset({"ingest"} if any("data/ingest/checkpoint" in link.reads for link in links) else ())


def ancestry(links: Sequence[Link], folder: str) -> list[str]:
    """Return a model folder, the one that it starts from, and so on, up to one that no entry produces."""
    found, by_folder = [folder], entries_by_folder(links)
    while (link := by_folder.get(found[-1])) and link.reads and link.reads[0] not in found:
        found.append(link.reads[0])
    return found


def lineage(links: Sequence[Link], folders: Iterable[str]) -> list[str]:
    """Return the names of all entries that model folders depend on, transitively, in topological order."""
    return list(_collect(entries_by_folder(links), folders, {}))


def _collect(by_folder: Mapping[str, Link], folders: Iterable[str], found: dict[str, None]) -> dict[str, None]:
    for folder in folders:
        link = by_folder.get(folder)
        if link and link.name not in found:
            _collect(by_folder, link.reads, found)
            found[link.name] = None
    return found


def evaluations(links: Sequence[Link]) -> list[Link]:
    """Return the evaluations in graph order of their models; models from user folders come first."""
    position = {link.folder: number for number, link in enumerate(links)}
    return sorted(
        (link for link in links if link.stage == "evaluate"), key=lambda link: position.get(link.reads[0], -1)
    )


def evaluated_ancestor(link: Link, links: Sequence[Link]) -> str | None:
    """Return the evaluation of the model's nearest evaluated ancestor, or None."""
    known = _by_folder(links)
    return next((known[folder] for folder in ancestry(links, link.reads[0])[1:] if folder in known), None)


def model_before_alignment(link: Link, links: Sequence[Link]) -> str | None:
    """Return the evaluation of the nearest chat model before the first alignment; None for an unaligned model."""
    known, by_folder = _by_folder(links), entries_by_folder(links)
    folders = ancestry(links, link.reads[0])
    stages = [by_folder[folder].stage if folder in by_folder else "" for folder in folders]
    if "align" not in stages:
        return None
    first = len(stages) - stages[::-1].index("align")
    chats = zip(folders[first:], stages[first:], strict=True)
    return next((known[folder] for folder, stage in chats if folder in known and stage != "pretrain"), None)


def _by_folder(links: Sequence[Link]) -> dict[str, str]:
    """Return the evaluation of each evaluated folder, the first one if there are several."""
    found: dict[str, str] = {}
    for link in evaluations(links):
        found.setdefault(link.reads[0], link.key)
    return found


def user_sources(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the provenance of each folder or file of the user's that stages read, with its hashes."""
    found = {
        path: (one["inputs"][path], files)
        for one in records
        for path, files in (one.get("user_provided") or one.get("brought") or {}).items()  # `brought`: earlier versions
    }
    return [
        {"name": path, "kind": "user_provided", "licence": "", "sha256": digest, "files": files}
        for path, (digest, files) in sorted(found.items())
    ]
