"""Find and open the package that is served: a plain folder with the exported models and what they were made from.

`BESSEMER_PACKAGE` names the folder; without it, it is `data/package` beside this code, in the repository as inside a
Bento, which carries a copy of it at the same place.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving import folders
from serving.errors import PackageError

if TYPE_CHECKING:
    from serving.engine import MaskEngine, TextEngine

VARIABLE = "BESSEMER_PACKAGE"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Package:
    """An opened package: its tag, where its models came from, and the engines, each loaded when first used."""

    folder: Path
    tag: str
    provenance: dict[str, Any]
    created: int  # seconds since 1970; taken once, because the folder may be made anew while this package is served

    @cached_property
    def text(self) -> "TextEngine":
        """The policy: it answers conversations."""
        from serving.engine import TextEngine

        return TextEngine(self.folder / "policy")

    @property
    def models(self) -> dict[str, "TextEngine"]:
        """The models that answer conversations, by tag; the first one answers where none is named."""
        return {self.tag: self.text}

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
    provenance = folders.read_json(folder / "provenance.json")
    tag = folders.read_key(folder / "provenance.json", "model")
    for name in ("policy/model.onnx", "encoder/model.onnx"):
        folders.required(folder / name)
    created = int((folder / "provenance.json").stat().st_mtime)
    return Package(folder, tag, provenance, created)
