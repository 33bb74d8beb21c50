"""Rules about model folders that the user brings: what their files rule out is reported before any stage runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.common import model_folder
from tasks.common.model_graph import Params, entries_of, lookup
from tasks.common.model_kinds import ModelKinds, config_of_folder
from tasks.common.settings import ENTRY_STAGES


def check_user_models(params: Params) -> Iterator[str]:
    """Report folders of the user's that cannot be loaded, and stages that a folder's family cannot pass."""
    kinds, seen = ModelKinds(params), set[str]()
    for stage in ENTRY_STAGES:
        for key, entry in entries_of(params, stage).items():
            where, path = _model_of(stage, key, entry)
            if path is None:
                continue
            if path not in seen and _is_user_folder(path, kinds):
                seen.add(path)
                for problem in model_folder.problems(Path(path)):
                    yield f"{where}: {path} cannot be used as a model: {problem}"
            for problem in _family_problems(stage, entry, kinds, path):
                yield f"{where}: {problem}"


def _model_of(stage: str, key: str, entry: Any) -> tuple[str, str | None]:
    """Return the setting that names an entry's model, and the folder; None for a new model."""
    name = "model.path" if stage == "pretrain" else "model"
    path = lookup(entry, name)
    new = stage == "pretrain" and lookup(entry, "model.name") == "new"
    return f"{stage}.{key}.{name}", path if isinstance(path, str) and not new else None


def _is_user_folder(path: str, kinds: ModelKinds) -> bool:
    return kinds.producer(path) is None and not path.startswith("data/") and Path(path).is_dir()


def _family_problems(stage: str, entry: Any, kinds: ModelKinds, path: str) -> Iterator[str]:
    """Report what the family of an entry's model, which its training keeps, rules out for the stage."""
    config = config_of_folder(kinds.root(path))
    if stage == "quantize" and not (Path(path) / model_folder.ENGINE_GRAPH).is_file():
        yield from model_folder.export_problems(config)
    if stage == "reward" or (stage == "finetune" and lookup(entry, "task.name") in ("classification", "regression")):
        yield from model_folder.head_problems(config)
    if stage == "prune" or lookup(entry, "method.name") == "adapter":
        yield from model_folder.layer_problems(config)
    if stage == "finetune" and lookup(entry, "task.packing") is not None:
        yield from model_folder.packing_problems(config)
