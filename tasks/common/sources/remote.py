"""Files on object storage or any other file system that fsspec knows (s3://, gs://, https://, file://).

A file is copied to the cache piece by piece, and nothing of it is read before its hash has been found right: what a
run learns from is what its settings name, whoever may write to the bucket. Keys and end points come from the
surroundings (for S3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`), never from the settings.
"""

import tempfile
from pathlib import Path

from tasks.common.identity import file_hash
from tasks.common.stage import StageError

CACHE = Path("data/.cache/files")


def fetch(name: str, url: str, sha256: str, cache: Path = CACHE) -> Path:
    """Return the file with this hash, from the cache or from its address; raise StageError if it is not the one meant.

    The cache is an ordinary folder, so the hash is checked on every read.
    """
    path = cache / sha256
    if path.is_file():
        found = file_hash(path)
        if found != sha256:
            told = _mismatch(name, url, sha256, found)
            raise StageError(f"{told} It came from the cache: remove {path} and try again.")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        got = Path(scratch, "file")
        _download(name, url, got)
        found = file_hash(got)
        if found != sha256:
            raise StageError(_mismatch(name, url, sha256, found))
        got.replace(path)
    return path


def _download(name: str, url: str, target: Path) -> None:
    from fsspec.core import url_to_fs

    try:
        files, place = url_to_fs(url)
        files.get_file(place, str(target))  # in pieces: a file need not fit into memory
    except Exception as error:  # every file system raises its own
        raise StageError(
            f"source {name}: {url} could not be read ({type(error).__name__}: {error}). Expected a file there; check "
            "the address, the network and the keys in the surroundings."
        ) from error


def _mismatch(name: str, url: str, expected: str, found: str) -> str:
    return (
        f"source {name}: {url} has the wrong hash. Expected sha256 {expected}, found {found}. Nothing was read from "
        "it. Change `sha256` in params.yaml only if you trust this file."
    )
