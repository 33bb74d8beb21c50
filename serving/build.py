"""Build the Bento, once per model and service version: `bessemer build`, or `python -m serving.build`.

The version is a hash of the package's provenance (which contains the model tag) and examples, of `bentofile.yaml` and
of every file in `serving/`, including the pinned requirements. An existing Bento of that version is reused. Nothing is
downloaded.

The models are plain files in the Bento, not entries of BentoML's model store: the service finds them beside its code
wherever it runs, an exported Bento is complete, and no second store has to match DVC's. The Bento is built from a copy
of these files only, so that `.venv` and other stages' data are not scanned and links into DVC's cache become files.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from serving.errors import ServingError
from serving.package import ROOT, Package, open_package

NAME = "bessemer"
BENTOFILE = "bentofile.yaml"


class BuildResult(NamedTuple):
    """A Bento in BentoML's store: its tag, its path, and whether this call built it."""

    tag: str
    path: Path
    created: bool


def build(folder: Path | None = None, root: Path = ROOT) -> BuildResult:
    """Return the Bento of a package (by default the served one); build it if it does not exist."""
    package = open_package(folder)
    version = bento_version(package, root)
    if found := _find(version):
        return BuildResult(f"{NAME}:{version}", found, created=False)
    with tempfile.TemporaryDirectory(prefix="bessemer-build-") as scratch:
        staging = Path(scratch)
        _copy(package, root, staging)
        _run_bentoml(staging, version, package.tag)
    path = _find(version)
    if path is None:
        raise ServingError(f"BentoML reported success, but its store does not contain {NAME}:{version}.")
    return BuildResult(f"{NAME}:{version}", path, created=True)


def bento_version(package: Package, root: Path = ROOT) -> str:
    """Return the Bento's version: 16 hex digits of a SHA-256 over provenance, examples, bentofile and service files."""
    content = {"provenance": package.provenance, "examples": asdict(package.examples)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for path in [root / BENTOFILE, *service_files(root)]:
        data = path.read_bytes()
        digest.update(f"\n{path.relative_to(root).as_posix()} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


def service_files(root: Path = ROOT) -> Iterator[Path]:
    """Yield the service's files in a fixed order, without `__pycache__`."""
    for path in sorted((root / "serving").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _copy(package: Package, root: Path, staging: Path) -> None:
    for path in [root / BENTOFILE, *service_files(root)]:
        target = staging / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copytree(package.folder, staging / "data" / "package")


def _run_bentoml(staging: Path, version: str, model: str) -> None:
    # In a subprocess: BentoML imports the service from the build folder, and this process has already imported it.
    command = [
        sys.executable,
        "-m",
        "bentoml",
        "build",
        str(staging),
        "--version",
        version,
        "--label",
        f"model={model}",
    ]
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run(command, cwd=staging, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and _find(version) is None:  # a concurrent build may have made it
        last = "\n".join((done.stderr + done.stdout).strip().splitlines()[-8:])
        raise ServingError(f"BentoML could not build {NAME}:{version}; it ended with:\n{last}")


def _find(version: str) -> Path | None:
    from bentoml.bentos import get
    from bentoml.exceptions import NotFound

    try:
        return Path(get(f"{NAME}:{version}").path)
    except NotFound:
        return None


def main() -> int:
    """Build the Bento and print whether it was built or already existed."""
    try:
        built = build()
    except ServingError as error:
        print(error, file=sys.stderr)
        return 1
    state = "built" if built.created else "already exists"
    print(f"{built.tag}: {state} ({built.path})\nServe it: bentoml serve {built.tag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
