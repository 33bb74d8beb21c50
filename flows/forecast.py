"""What a change leaves as it is, said before anything runs: a new ranking re-runs `ingest`, but no pretraining.

DVC finds out when a stage has run that some of its outputs came out the same. A stage may say so beforehand, in the
`meta` of dvc.yaml: `apart: {INPUT: [OUTPUTS]}`, "where files are added to this input and nothing else changes, these
outputs stay as they are". It is a forecast and decides nothing. A test of the whole chain holds it against a run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Apart = Mapping[str, Sequence[str]]


def apart_of(stage: Any) -> dict[str, tuple[str, ...]]:
    """Return what a DVC stage says of its inputs: path to the outputs that its growth leaves as they are."""
    meta = stage.meta if isinstance(stage.meta, dict) else {}
    return {path: tuple(outs) for path, outs in meta.get("apart", {}).items()}


def left_alone(apart: Apart, changed: Iterable[str]) -> tuple[str, ...]:
    """Return the outputs that stay as they are where just these inputs change."""
    kept = [set(apart.get(path, ())) for path in changed]
    return tuple(sorted(set.intersection(*kept))) if kept else ()


def changed_inputs(stage: Any, root: Path, apart: Apart) -> Iterator[str]:
    """Yield the paths of a DVC stage's changed inputs; of a folder just the part that grew, if nothing else changed."""
    for dep in stage.deps:
        if hasattr(dep, "params"):
            if dep.status():
                yield "params.yaml"
        elif dep.status():
            path = _relative(dep.fs_path, root)
            inside = (part for part in apart if Path(part).is_relative_to(path) and _grew(dep, part, path))
            yield next(inside, path)


def touched(reads: Iterable[str], changed: Iterable[str]) -> set[str]:
    """Return which of the changed paths are read: themselves, as a part of a folder, or with the folder they lie in."""
    read = set(reads)
    folders = {str(parent) for path in read for parent in Path(path).parents}
    return {path for path in changed if path in folders or not read.isdisjoint([path, *map(str, Path(path).parents)])}


def _grew(dep: Any, part: str, path: str) -> bool:
    """Whether a folder is what it was but for the last files, by name, of one of its parts."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.tree import Tree

    if not dep.hash_info or not dep.fs.isdir(dep.fs_path):
        return False
    built: Any = build(dep.cache, dep.fs_path, dep.fs, dep.hash_name, ignore=dep.dvcignore, dry_run=True)
    entries = sorted(built[2], key=lambda entry: entry[0])
    below = Path(part).relative_to(path).parts
    new = [entry for entry in entries if entry[0][: len(below)] == below]
    rest = [entry for entry in entries if entry not in new]
    for known in range(len(new) - 1, -1, -1):
        tree: Any = Tree()  # type: ignore[no-untyped-call]
        for entry in (*rest, *new[:known]):
            tree.add(*entry)
        tree.digest()
        if tree.hash_info == dep.hash_info:
            return True
    return False


def _relative(path: str, root: Path) -> str:
    found = Path(path)
    return found.relative_to(root).as_posix() if found.is_relative_to(root) else path
