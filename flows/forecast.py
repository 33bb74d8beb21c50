"""Forecast of unchanged outputs for `bessemer plan`: new rankings rerun `ingest`, but not pretraining.

DVC itself notices only after a stage has run that some of its outputs are unchanged. A stage can declare that in the
`meta` of dvc.yaml: with `unaffected_outputs: {INPUT: [OUTPUTS]}`, the outputs stay the same if files are appended to
the input and nothing else changes. The forecast affects only the plan. A test of the whole pipeline compares it with a
run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

UnaffectedOutputs = Mapping[str, Sequence[str]]


def read_unaffected_outputs(stage: Any) -> dict[str, tuple[str, ...]]:
    """Return a DVC stage's declaration: input path -> outputs that stay the same when files are appended to it."""
    meta = stage.meta if isinstance(stage.meta, dict) else {}
    return {path: tuple(outs) for path, outs in meta.get("unaffected_outputs", {}).items()}


def unaffected_outputs(declared: UnaffectedOutputs, changed: Iterable[str]) -> tuple[str, ...]:
    """Return the outputs that stay the same if only these inputs change."""
    unaffected = [set(declared.get(path, ())) for path in changed]
    return tuple(sorted(set.intersection(*unaffected))) if unaffected else ()


def changed_inputs(stage: Any, root: Path, declared: UnaffectedOutputs) -> Iterator[str]:
    """Yield the paths of a DVC stage's changed inputs.

    If files were only appended to a declared part of an input folder, the path is that of the part.
    """
    for dep in stage.deps:
        if hasattr(dep, "params"):
            if dep.status():
                yield "params.yaml"
        elif dep.status():
            path = _relative_path(dep.fs_path, root)
            inside = (part for part in declared if Path(part).is_relative_to(path) and _only_appended(dep, part, path))
            yield next(inside, path)


def changed_reads(reads: Iterable[str], changed: Iterable[str]) -> set[str]:
    """Return the changed paths that equal, contain or lie inside one of the paths read."""
    read = set(reads)
    folders = {str(parent) for path in read for parent in Path(path).parents}
    return {path for path in changed if path in folders or not read.isdisjoint([path, *map(str, Path(path).parents)])}


def _only_appended(dep: Any, part: str, path: str) -> bool:
    """Whether a folder differs only by new files at the end, in name order, of one of its parts."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.tree import Tree

    if not dep.hash_info or not dep.fs.isdir(dep.fs_path):
        return False
    built: Any = build(dep.cache, dep.fs_path, dep.fs, dep.hash_name, ignore=dep.dvcignore, dry_run=True)
    entries = sorted(built[2], key=lambda entry: entry[0])
    prefix = Path(part).relative_to(path).parts
    new = [entry for entry in entries if entry[0][: len(prefix)] == prefix]
    rest = [entry for entry in entries if entry not in new]
    for known in range(len(new) - 1, -1, -1):
        tree: Any = Tree()  # type: ignore[no-untyped-call]
        for entry in (*rest, *new[:known]):
            tree.add(*entry)
        tree.digest()
        if tree.hash_info == dep.hash_info:
            return True
    return False


def _relative_path(path: str, root: Path) -> str:
    found = Path(path)
    return found.relative_to(root).as_posix() if found.is_relative_to(root) else path
