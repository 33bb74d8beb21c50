"""Models of other stages that answer beside the packaged one: `bessemer serve --with tuned --with base`.

The endpoint runs INT8 without torch, so such a model is exported on demand, by the code and the settings of
`quantize@policy`, into a folder that `serving.package` opens. The folders are a cache (`data/.cache/models`, ignored
by git and unknown to DVC): keyed by all they are made from, they are no part of the chain, and may be removed.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows.records import read_json
from tasks.common import identity, settings
from tasks.common.settings import BessemerError, Numerics, read_params
from tasks.common.stage import write_json

CACHE = Path("data/.cache/models")
EXPORTER = "tasks.quantize"


def known() -> dict[str, str]:
    """Return the models that can be added to the packaged one, as the sheet calls them: name to project path."""
    from tasks.evaluate import DECODERS

    return {name: path for name, path in DECODERS.items() if not path.startswith("data/quantize/")}


def must_know(names: Sequence[str]) -> None:
    """Raise BessemerError where a name is none of the models that can be added."""
    unknown = [name for name in names if name not in known()]
    if unknown:
        raise BessemerError(
            f"There is no model {unknown[0]!r} to add; there are {', '.join(known())}. The packaged one always answers."
        )


def ready(project: Path, names: Sequence[str], tell: Callable[[str], None] = print) -> dict[str, Path]:
    """Return a folder to serve for each model, exported now where there is none; `tell` is told of what takes time.

    Raises BessemerError, before anything is exported, where a model is unknown, not made yet or of another kind.
    """
    names = list(dict.fromkeys(names))
    if not names:
        return {}
    must_know(names)
    params = read_params(project / "params.yaml")
    settings.check(params)
    records = {name: _record(project, name) for name in names}
    return {name: _folder(project, name, record, params, tell) for name, record in records.items()}


def _record(project: Path, name: str) -> dict[str, Any]:
    """Return the record of the stage that made a model, the model's bytes held against it."""
    paths = known()
    folder = project / paths[name]
    record = read_json(folder.parent / "record.json")
    if not isinstance(record, dict) or not folder.is_dir():
        stage = "@".join(Path(paths[name]).parts[1:-1])
        raise BessemerError(f"The model {name} is not there yet: `bessemer run -s {stage}` makes {paths[name]}.")
    if identity.tree_hash(folder) != record["outputs"][paths[name]]:
        raise BessemerError(
            f"{paths[name]} is not what {record['stage']} made, so its record does not speak of it: "
            f"`bessemer run -s {record['stage']}` makes it again."
        )
    kinds = (read_json(folder / "config.json") or {}).get("architectures") or ["model without a kind"]
    if not any(kind.endswith("ForCausalLM") for kind in kinds):
        raise BessemerError(
            f"The model {name} is a {kinds[0]}, which answers no questions; set finetune.task to {{name: chat, ...}} "
            "and run the chain again, or leave it out."
        )
    return record


def _folder(
    project: Path, name: str, record: dict[str, Any], params: dict[str, Any], tell: Callable[[str], None]
) -> Path:
    from tasks.quantize import PolicyConfig

    source = known()[name]
    config = PolicyConfig.model_validate(params["quantize"]["policy"])
    numerics = Numerics.model_validate(params["numerics"])
    recipe = identity.recipe(
        code={str(path): identity.file_hash(project / path) for path in identity.code_files(EXPORTER, project)},
        settings=config.model_dump(mode="json"),
        numerics=numerics.model_dump(mode="json"),
        seed=params["base"]["seed"],
        lock=identity.lock_hash(project / identity.LOCK),
        inputs={source: record["outputs"][source]},
        key="policy",
    )
    target = project / CACHE / f"{name}-{identity.hash_json([recipe, record['recipe'], record['content']])[:16]}"
    if not (target / "policy").is_dir():
        tell(f"Exporting the model {name} to INT8, once ...")
        _export(project / source, target, config, numerics, params["base"]["seed"])
    provenance = {
        "model": identity.tag(record["recipe"], record["content"]),
        "recipe": record["recipe"],
        "content": record["content"],
        "export": {"recipe": recipe, "content": identity.tree_hash(target / "policy")},
        "stages": lineage(project, record),
        "sources": read_json(project / "data/ingest/sources.json"),
    }
    if read_json(target / "provenance.json") != provenance:
        write_json(target / "provenance.json", provenance)
    return target


def _export(source: Path, target: Path, config: Any, numerics: Numerics, seed: int) -> None:
    """Write a model's INT8 folder beside its place, and move it there whole."""
    from tasks import quantize
    from tasks.common.modelling import models

    numerics = quantize.on_cpu(numerics)
    models.prepare_torch(numerics, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        quantize.write_folder(config, source, made / "policy", numerics)
        try:
            made.replace(target)
        except OSError:
            if not (target / "policy").is_dir():  # else another command has made the same meanwhile
                shutil.rmtree(target, ignore_errors=True)
                made.replace(target)


def lineage(project: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a stage's record after those of all that it was made from, directly or not, as far as they lie there."""
    paths = sorted([*project.glob("data/*/record.json"), *project.glob("data/*/*/record.json")])
    makers = {path: maker for maker in map(_read, paths) for path in maker["outputs"]}
    found: dict[str, dict[str, Any]] = {}

    def visit(one: dict[str, Any]) -> None:
        for path, content in one["inputs"].items():
            maker = makers.get(path)
            if maker and maker["outputs"][path] == content and maker["stage"] not in found:
                visit(maker)
        found[one["stage"]] = one

    visit(record)
    return list(found.values())


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
