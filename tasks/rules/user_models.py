"""Rules about model folders that the user brings: what their files rule out is reported before any stage runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.common import model_folder
from tasks.common.model_graph import Params, entries_of, lookup
from tasks.common.settings import ENTRY_STAGES
from tasks.rules.model_kinds import HEAD_TASKS, ModelKinds, config_of_folder

SHARD_SETTINGS = {  # settings that, if they are not 0, train an entry's model on the token shards
    "finetune": "pretraining_mix.weight", "align": "algorithm.ptx.weight", "prune": "windows",
}  # fmt: skip


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
            yield from _vocabulary_problems(stage, key, entry, kinds, path)


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
    if stage == "reward" or (stage == "finetune" and lookup(entry, "task.name") in HEAD_TASKS):
        yield from model_folder.head_problems(config)
    if stage == "prune" or lookup(entry, "method.name") == "adapter":
        yield from model_folder.layer_problems(config)
    if stage == "finetune" and lookup(entry, "task.packing") is not None:
        yield from model_folder.packing_problems(config)
    if lookup(entry, "method.name") == "qlora" and model_folder.is_adapter(Path(path)):
        yield "the method qlora loads a model in four bits and takes no adapter: use lora, or merge the adapter first"


def _vocabulary_problems(stage: str, key: str, entry: Any, kinds: ModelKinds, path: str) -> Iterator[str]:
    """Report training on token shards that another tokenizer than the model's has encoded."""
    setting, root = SHARD_SETTINGS.get(stage), kinds.root(path)
    if setting is None:
        return
    if not root or not lookup(entry, setting) or not Path(root).is_dir():
        return
    given = lookup(kinds.params, "tokenize.tokenizer.name") == "from"
    source = str(lookup(kinds.params, "tokenize.tokenizer.path")) if given else ""
    if source == root or (given and _same_vocabulary(source, root)):
        return
    yield (
        f"{stage}.{key}.{setting}: found {lookup(entry, setting)}, but the token shards hold the ids of another "
        f"tokenizer ({source or 'the one that tokenize trains'}) than that of the model, {root}: set it to 0, or "
        f"tokenize.tokenizer to {{name: from, path: {root}}}"
    )


def _same_vocabulary(folder: str, other: str) -> bool:
    """Return whether two folders' tokenizers have equal ids, or one of them cannot be read, which is reported later."""
    files = [model_folder.read_json(Path(path, "tokenizer.json")) for path in (folder, other)]
    parts = [(lookup(file, "model.vocab"), file.get("added_tokens")) for file in files]
    return not all(files) or parts[0] == parts[1]
