"""Files on object storage or any other file system that fsspec knows (s3://, gs://, https://, file://).

A file is downloaded to the cache in pieces, and is read only after its hash has been verified: the settings determine
what a run trains on, whoever can write to the bucket. Credentials and endpoints come from environment variables (for
S3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`), never from the settings.
"""

import tempfile
from pathlib import Path

from tasks.common.harness.job import StageError
from tasks.common.identity import file_hash

CACHE = Path("data/.cache/files")


def fetch(name: str, url: str, sha256: str, cache: Path = CACHE) -> Path:
    """Return the path of the file, from the cache or downloaded; raise StageError if its hash is wrong.

    The cache is an ordinary folder, so the hash is verified on every call.
    """
    path = cache / sha256
    if path.is_file():
        found = file_hash(path)
        if found != sha256:
            message = _describe_mismatch(name, url, sha256, found)
            raise StageError(f"{message} It came from the cache: remove {path} and try again.")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        downloaded = Path(scratch, "file")
        _download(name, url, downloaded)
        found = file_hash(downloaded)
        if found != sha256:
            raise StageError(_describe_mismatch(name, url, sha256, found))
        downloaded.replace(path)
    return path


def _download(name: str, url: str, target: Path) -> None:
    from fsspec.core import url_to_fs

    try:
        filesystem, remote_path = url_to_fs(url)
        filesystem.get_file(remote_path, str(target))  # in pieces: a file need not fit into memory
    except Exception as error:  # each file system raises its own exceptions
        raise StageError(
            f"source {name}: {url} could not be read ({type(error).__name__}: {error}). Expected a file there; check "
            "the address, the network and the credentials in the environment."
        ) from error


def _describe_mismatch(name: str, url: str, expected: str, found: str) -> str:
    return (
        f"source {name}: {url} has the wrong hash. Expected sha256 {expected}, found {found}. Nothing was read from "
        "it. Change `sha256` in params.yaml only if you trust this file."
    )
