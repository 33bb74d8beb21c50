"""Find and open the served models: the package, and further models to compare with it.

The package is a plain folder with the exported models and their provenance. `BESSEMER_PACKAGE` names it; the default is
`data/package` beside this code, both in the repository and in a Bento, which contains a copy at that path.
`BESSEMER_MODELS` names further models as a JSON object, name to folder (`bessemer serve --with` sets it); each folder
is a package with `chat/` and `provenance.json`. A Bento contains only its package. A package contains a chat model
(`chat/`), an encoder (`encoder/`), a classifier (`classifier/`) or several; requests for a missing part get status 404.
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
    from serving.classification import ClassifierEngine
    from serving.engine import MaskEngine, TextEngine
    from serving.examples import Examples

PACKAGE_VARIABLE = "BESSEMER_PACKAGE"
MODELS_VARIABLE = "BESSEMER_MODELS"
ROUTES = {"chat": "/generate", "encoder": "/fill-mask", "classifier": "/classify"}  # of each part of a package
PARTS = tuple(ROUTES)
PART_NAMES = {"chat": "chat model", "encoder": "encoder", "classifier": "classifier"}
PACKAGED_NAME = "bessemer"  # stable name of the packaged model, so that clients need not know its tag
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Model:
    """A served model: name, tag, provenance, and a lazily loaded engine.

    The folder's metadata is read once, because the folder may be rewritten while the model is served.
    """

    name: str
    folder: Path
    tag: str
    provenance: dict[str, Any]
    created: int  # Unix time in seconds
    parts: tuple[str, ...] = ("chat",)  # of PARTS

    @property
    def has_chat(self) -> bool:
        """Whether it has a chat model; a package may contain only other parts."""
        return "chat" in self.parts

    @cached_property
    def text(self) -> "TextEngine":
        """The engine of the chat model; raises InputError if there is none."""
        from serving.engine import TextEngine

        self.require("chat", "no_chat_model")
        return TextEngine(self.folder / "chat")

    def missing(self, part: str) -> str:
        """Return a sentence: the package has no such part, and the requests that it answers."""
        return (
            f"The package contains no {PART_NAMES[part]}: use "
            f"{' or '.join(f'POST {ROUTES[other]}' for other in self.parts)}."
        )

    def require(self, part: str, code: str) -> None:
        """Raise InputError with status 404 if it has no such part."""
        if part not in self.parts:
            raise InputError(self.missing(part), field="model", code=code, status=404)


@dataclass(frozen=True)
class Package(Model):
    """The packaged model: a chat model, an encoder, a classifier, or several of them."""

    @property
    def has_encoder(self) -> bool:
        """Whether it has an encoder."""
        return "encoder" in self.parts

    @property
    def has_classifier(self) -> bool:
        """Whether it has a classifier or a regressor."""
        return "classifier" in self.parts

    @cached_property
    def examples(self) -> "Examples":
        """Prompts and texts of the project's own data."""
        from serving.examples import read_examples

        return read_examples(self.folder)

    @cached_property
    def masks(self) -> "MaskEngine":
        """The engine of the encoder; raises InputError if there is none."""
        from serving.engine import MaskEngine

        self.require("encoder", "no_encoder")
        context = folders.read_key(self.folder / "encoder/limits.json", "context")
        return MaskEngine(self.folder / "encoder", context)

    @cached_property
    def classifier(self) -> "ClassifierEngine":
        """The engine of the classifier; raises InputError if there is none."""
        from serving.classification import ClassifierEngine

        self.require("classifier", "no_classifier")
        return ClassifierEngine(self.folder / "classifier")


def package_folder() -> Path:
    """Return the folder of the served package; it need not exist."""
    chosen = os.environ.get(PACKAGE_VARIABLE)
    return Path(chosen).resolve() if chosen else ROOT / "data" / "package"


def open_package(folder: Path | None = None) -> Package:
    """Open a package, by default the served one; raise PackageError if it is missing or incomplete."""
    folder = folder or package_folder()
    if not folder.is_dir():
        chosen = f" ({PACKAGE_VARIABLE} names it)" if os.environ.get(PACKAGE_VARIABLE) else ""
        raise PackageError(f"There is no package at {folder}{chosen}. Run `bessemer run` to make one.")
    return Package(PACKAGED_NAME, folder, *_read_description(folder))


def open_models(package: Package) -> dict[str, Model]:
    """Return all served models by name: the package first, then those of `BESSEMER_MODELS`."""
    models: dict[str, Model] = {package.name: package}
    for name, folder in _other_models().items():
        path = Path(folder)
        if not path.is_dir():
            raise PackageError(f"There is no model {name!r} at {path} ({MODELS_VARIABLE} names it).")
        models[name] = Model(name, path, *_read_description(path))
    return models


def choose(models: Mapping[str, Model], name: str | None) -> Model:
    """Return the model with a name or tag, the packaged one for None; raise InputError if there is none."""
    for model in models.values():
        if name in (None, model.name, model.tag):
            return model
    known = ", ".join(f"{model.name} ({model.tag})" for model in models.values())
    message = f'The model "{name}" does not exist here; there {"are" if len(models) > 1 else "is"} {known}.'
    raise InputError(message, field="model", code="model_not_found", status=404)


def _read_description(folder: Path) -> tuple[str, dict[str, Any], int, tuple[str, ...]]:
    """Return a folder's tag, provenance, creation time and parts."""
    path = folder / "provenance.json"
    provenance, tag = folders.read_json(path), folders.read_key(path, "model")
    parts = tuple(part for part in PARTS if _has_part(folder, part))
    for part in parts or PARTS[:1]:
        folders.require_file(folder / part / folders.GRAPH_FILE)
    return tag, provenance, int(path.stat().st_mtime), parts


def _has_part(folder: Path, part: str) -> bool:
    """Return whether a package has a part; an absent part has no folder or an empty one."""
    return (folder / part).is_dir() and any((folder / part).iterdir())


def _other_models() -> dict[str, str]:
    text = os.environ.get(MODELS_VARIABLE) or "{}"
    try:
        others = json.loads(text)
    except ValueError:
        others = None
    good = isinstance(others, dict) and all(isinstance(folder, str) and name for name, folder in others.items())
    if not good or PACKAGED_NAME in others:
        raise PackageError(
            f"{MODELS_VARIABLE} must be a JSON object from names to folders, without the name {PACKAGED_NAME!r}; found "
            f"{text!r}. `bessemer serve --with NAME` sets it."
        )
    return dict(others)
