"""Make the Bento, once for each model and each state of the service: `bessemer build`, or `python -m serving.build`.

The version is a hash of the package's provenance (the model tag stands in it), of `bentofile.yaml` and of every file
in `serving/`, its pinned requirements included. Where a Bento of that version exists it is returned; a changed service
or another model makes a new one. Nothing is downloaded.

The models go into the Bento as plain files, not through BentoML's model store: the service then finds them beside its
code wherever it runs, an exported Bento is whole, and there is no second store to keep in step with DVC's. The Bento
is built from a copy of just these files, so that `.venv` and the data of other stages are not searched, and links
into DVC's cache become files.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from serving.errors import ServingError
from serving.package import ROOT, Package, open_package

NAME = "bessemer"
BENTOFILE = "bentofile.yaml"


class Built(NamedTuple):
    """A Bento in BentoML's store: its tag, where it lies, and whether it was made just now."""

    tag: str
    path: Path
    made: bool


def build(folder: Path | None = None, root: Path = ROOT) -> Built:
    """Return the Bento of a package (by default the one that is served here), made if there is none yet."""
    package = open_package(folder)
    version = version_of(package, root)
    if found := _find(version):
        return Built(f"{NAME}:{version}", found, made=False)
    with tempfile.TemporaryDirectory(prefix="bessemer-build-") as scratch:
        stage = Path(scratch)
        _copy(package, root, stage)
        _run_bentoml(stage, version, package.tag)
    path = _find(version)
    if path is None:
        raise ServingError(f"BentoML said that it made {NAME}:{version}, but its store has no such Bento.")
    return Built(f"{NAME}:{version}", path, made=True)


def version_of(package: Package, root: Path = ROOT) -> str:
    """Return the Bento's version: 16 hexadecimal digits over all that makes it what it is."""
    digest = hashlib.sha256(json.dumps(package.provenance, sort_keys=True).encode())
    for path in [root / BENTOFILE, *service_files(root)]:
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def service_files(root: Path = ROOT) -> Iterator[Path]:
    """Yield the service's files in a fixed order, what Python compiled left out."""
    for path in sorted((root / "serving").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _copy(package: Package, root: Path, stage: Path) -> None:
    for path in [root / BENTOFILE, *service_files(root)]:
        target = stage / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copytree(package.folder, stage / "data" / "package")


def _run_bentoml(stage: Path, version: str, model: str) -> None:
    # In a process of its own: BentoML imports the service from the folder it builds, and here it is loaded already.
    command = [sys.executable, "-m", "bentoml", "build", str(stage), "--version", version, "--label", f"model={model}"]
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run(command, cwd=stage, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and _find(version) is None:  # another build may have made it meanwhile
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
    """Build, and say whether there was anything to do."""
    try:
        built = build()
    except ServingError as error:
        print(error, file=sys.stderr)
        return 1
    state = "made" if built.made else "there already, nothing to do"
    print(f"{built.tag}: {state} ({built.path})\nServe it: bentoml serve {built.tag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
