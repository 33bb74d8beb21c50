"""Find and open what is served: the package and, beside it, other models that a person wants to compare with it.

The package is a plain folder with the exported models and what they were made from. `BESSEMER_PACKAGE` names it;
without it, it is `data/package` beside this code, in the repository as inside a Bento, which carries a copy of it at
the same place. `BESSEMER_MODELS` names further models as a JSON object, name to folder (`bessemer serve --with` sets
it); such a folder is a package without an encoder: `policy/` and `provenance.json`. A Bento has its package alone.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving import folders
from serving.errors import InputError, PackageError

if TYPE_CHECKING:
    from serving.engine import MaskEngine, TextEngine

VARIABLE = "BESSEMER_PACKAGE"
OTHERS = "BESSEMER_MODELS"
PACKAGED = "bessemer"  # the packaged model's name here, whatever it was made from: clients need not follow its tag
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Model:
    """A model that answers conversations: its name here, its tag, where it came from, and its engine, once used."""

    name: str
    folder: Path
    tag: str
    provenance: dict[str, Any]
    created: int  # seconds since 1970; taken once, because the folder may be made anew while this model is served

    @cached_property
    def text(self) -> "TextEngine":
        """The decoder: it answers conversations."""
        from serving.engine import TextEngine

        return TextEngine(self.folder / "policy")


@dataclass(frozen=True)
class Package(Model):
    """The packaged model, with the encoder that stands beside it."""

    @cached_property
    def masks(self) -> "MaskEngine":
        """The encoder: it fills in names."""
        from serving.engine import MaskEngine

        context = folders.read_key(self.folder / "policy/limits.json", "context")
        return MaskEngine(self.folder / "encoder", context)


def package_folder() -> Path:
    """Return the folder that is served, whether or not it is there."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).resolve() if chosen else ROOT / "data" / "package"


def open_package(folder: Path | None = None) -> Package:
    """Open a package; without a folder, the one that is served here."""
    folder = folder or package_folder()
    if not folder.is_dir():
        chosen = f" ({VARIABLE} names it)" if os.environ.get(VARIABLE) else ""
        raise PackageError(f"There is no package at {folder}{chosen}. Run `bessemer run` to make one.")
    folders.required(folder / "encoder/model.onnx")
    return Package(PACKAGED, folder, *_described(folder))


def open_models(package: Package) -> dict[str, Model]:
    """Return every model that is to answer here by its name: the package first, then those that `OTHERS` names."""
    models: dict[str, Model] = {package.name: package}
    for name, folder in _others().items():
        path = Path(folder)
        if not path.is_dir():
            raise PackageError(f"There is no model {name!r} at {path} ({OTHERS} names it).")
        models[name] = Model(name, path, *_described(path))
    return models


def choose(models: Mapping[str, Model], name: str | None) -> Model:
    """Return the model of a name or of a tag, the packaged one where none is named; InputError: there is none."""
    for model in models.values():
        if name in (None, model.name, model.tag):
            return model
    known = ", ".join(f"{model.name} ({model.tag})" for model in models.values())
    message = f'The model "{name}" does not exist here; there {"are" if len(models) > 1 else "is"} {known}.'
    raise InputError(message, field="model", code="model_not_found", status=404)


def _described(folder: Path) -> tuple[str, dict[str, Any], int]:
    """Return a folder's tag, its provenance and when it was made."""
    path = folder / "provenance.json"
    provenance, tag = folders.read_json(path), folders.read_key(path, "model")
    folders.required(folder / "policy/model.onnx")
    return tag, provenance, int(path.stat().st_mtime)


def _others() -> dict[str, str]:
    text = os.environ.get(OTHERS) or "{}"
    try:
        others = json.loads(text)
    except ValueError:
        others = None
    good = isinstance(others, dict) and all(isinstance(folder, str) and name for name, folder in others.items())
    if not good or PACKAGED in others:
        raise PackageError(
            f"{OTHERS} must be a JSON object that gives a folder for each name, none of them {PACKAGED!r}; found "
            f"{text!r}. `bessemer serve --with NAME` sets it rightly."
        )
    return dict(others)
