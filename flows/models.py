"""Additional models for the endpoint, beside the packaged one: `bessemer serve --with tuned --with finetune@chat`.

The endpoint runs INT8 without torch, so such a model is exported on demand, with the code and settings of the packaged
model, to a folder that `serving.package` can open. The folders are a cache in `data/.cache/models`, ignored by git and
DVC. A folder's name contains a hash of all its inputs, so the cache may be deleted at any time.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.records import read_json
from tasks.common import identity, model_folder, params_file
from tasks.common.code import stages
from tasks.common.harness.lineage import user_sources
from tasks.common.harness.records import write_json
from tasks.common.model_graph import entries_of, links_of, lookup
from tasks.common.raw_params import read_params
from tasks.common.settings import Base, BessemerError, Numerics
from tasks.rules.model_kinds import ModelKinds

CACHE = Path("data/.cache/models")
EXPORTER = "tasks.quantize.stage"


def available_models(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the models that can be served beside the packaged one, by name, with their folders.

    A name is an entry of `evaluate` (`tuned`), or the stage that makes the model (`finetune@chat`).
    """
    kinds, found = ModelKinds(params), dict[str, str]()
    for link in links_of(params):
        folder = link.reads[0] if link.stage == "evaluate" and link.reads else link.folder
        export = kinds.producer(folder)
        kind = (
            kinds.kind(lookup(export.settings, "model"))
            if export and export.stage == "quantize"
            else kinds.kind(folder)
        )
        if kind in ("causal", None) and folder != lookup(params, "package.chat"):
            found[link.key if link.stage == "evaluate" else link.name] = folder
    return found


def resolve_models(project: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the available models; raise BessemerError if one of `names` is not among them."""
    params = read_params(project / "params.yaml")
    params_file.check(params)
    available = available_models(params)
    unknown = [name for name in names if name not in available]
    if unknown:
        raise BessemerError(
            f"There is no additional model {unknown[0]!r}; available are {', '.join(available)}. "
            "The packaged one is always served."
        )
    return available


def prepare_models(project: Path, names: Sequence[str], report: Callable[[str], None] = print) -> dict[str, Path]:
    """Return a folder to serve for each model, exporting those that are not cached; `report` announces an export.

    Raises BessemerError before any export if a model is unknown, not trained yet or not a causal model.
    """
    names = list(dict.fromkeys(names))
    if not names:
        return {}
    folders = resolve_models(project, names)
    params = read_params(project / "params.yaml")
    records = {name: _verified_record(project, name, folders[name]) for name in names}
    return {
        name: _served_folder(project, name, folders[name], record, params, report) for name, record in records.items()
    }


def _verified_record(project: Path, name: str, path: str) -> dict[str, Any]:
    """Return the record of the stage that made a model, after checking the model's hash against it.

    For a folder that the user provided, the record is made from the folder's hashes.
    """
    folder = project / path
    record = read_json(folder.parent / "record.json")
    parts = Path(path).parts
    if parts[0] != "data" and folder.is_dir():
        base = model_folder.base_of(folder)  # of an adapter
        parts_by_path = {path: folder} if base == folder else {path: folder, str(base): base}
        hashes = {name: identity.tree_hash(part) for name, part in parts_by_path.items()}
        digest = hashes[path] if base == folder else identity.hash_json(hashes)
        record = {
            "stage": path, "recipe": digest, "content": digest, "inputs": hashes, "outputs": hashes,
            "user_provided": {name: identity.file_hashes(part) for name, part in parts_by_path.items()},
        }  # fmt: skip
    if not isinstance(record, dict) or not folder.is_dir():
        stage = "@".join(parts[1:-1])
        raise BessemerError(f"The model {name} does not exist yet: `bessemer run -s {stage}` makes {path}.")
    if identity.tree_hash(folder) != record["outputs"][path]:
        raise BessemerError(
            f"{path} differs from the output recorded by {record['stage']}: "
            f"`bessemer run -s {record['stage']}` makes it again."
        )
    config = model_folder.read_json(model_folder.base_of(folder) / model_folder.CONFIG)
    if not _is_exported(folder) and model_folder.kind_of(config) != "causal":
        kind = (config.get("architectures") or ["model of unknown architecture"])[0]
        raise BessemerError(
            f"The model {name} is a {kind}, not a causal language model; choose another one, or omit it."
        )
    return record


def _is_exported(folder: Path) -> bool:
    from serving import folders

    return (folder / folders.GRAPH_FILE).is_file()


def _served_folder(
    project: Path, name: str, source: str, record: dict[str, Any], params: dict[str, Any], report: Callable[[str], None]
) -> Path:
    from tasks.quantize.stage import Config

    config = Config.model_validate({**export_settings(params), "model": source})
    numerics, seed = Numerics.model_validate(params["numerics"]), Base.model_validate(params["base"]).seed
    recipe = identity.recipe(
        code=stages.digest_code(stages.digest_module(EXPORTER, project)),
        settings=config.model_dump(mode="json"),
        numerics=numerics.model_dump(mode="json"),
        seed=seed,
        lock=identity.lock_hash(project / identity.LOCK_FILE),
        inputs={source: record["outputs"][source]},
        key="chat",
    )
    target = project / CACHE / f"{name}-{identity.hash_json([recipe, record['recipe'], record['content']])[:16]}"
    if not (target / "chat").is_dir():
        if not _is_exported(project / source):
            report(f"Exporting the model {name} to INT8 (only once) ...")
        _export(project / source, target, config, numerics, seed)
    ancestors = lineage(project, record)
    provenance = {
        "model": identity.tag(record["recipe"], record["content"]),
        "recipe": record["recipe"],
        "content": record["content"],
        "export": {"recipe": recipe, "content": identity.tree_hash(target / "chat")},
        "stages": [one for one in ancestors if one["stage"] != source],
        "sources": [*(read_json(project / "data/ingest/sources.json") or []), *user_sources(ancestors)],
    }
    if read_json(target / "provenance.json") != provenance:
        write_json(target / "provenance.json", provenance)
    return target


def export_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the export settings of the packaged chat model, or else of the first exported causal model."""
    kinds, exports = ModelKinds(params), entries_of(params, "quantize")
    packaged = kinds.producer(lookup(params, "package.chat"))
    chats = [entry for entry in exports.values() if kinds.kind(lookup(entry, "model")) == "causal"]
    return dict(packaged.settings if packaged else next(iter(chats), {}))


def _export(source: Path, target: Path, config: Any, numerics: Numerics, seed: int) -> None:
    """Export a model, or copy it if it is exported already, to a scratch folder, and move that to `target`."""
    from tasks.common.modelling import torch_setup
    from tasks.quantize import stage as quantize

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
        folder = Path(scratch, "made")
        folder.mkdir()
        if _is_exported(source):
            quantize.adopt_folder(config, source, folder / "chat")
        else:
            numerics = quantize.cpu_numerics(numerics)
            torch_setup.prepare_torch(numerics, seed)
            quantize.write_folder(config, source, folder / "chat", numerics)
        try:
            folder.replace(target)
        except OSError:
            if not (target / "chat").is_dir():  # otherwise another process has exported the same meanwhile
                shutil.rmtree(target, ignore_errors=True)
                folder.replace(target)


def lineage(project: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of all ancestors of a stage, as far as they exist, followed by its own."""
    paths = sorted([*project.glob("data/*/record.json"), *project.glob("data/*/*/record.json")])
    makers = {path: maker for maker in map(_read_record, paths) for path in maker["outputs"]}
    found: dict[str, dict[str, Any]] = {}

    def visit(current: dict[str, Any]) -> None:
        for path, content in current["inputs"].items():
            maker = makers.get(path)
            if maker and maker["outputs"][path] == content and maker["stage"] not in found:
                visit(maker)
        found[current["stage"]] = current

    visit(record)
    return list(found.values())


def _read_record(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
