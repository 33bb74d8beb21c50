"""Store of finished evaluations: what was measured once is not measured again, and a stopped stage resumes.

A result is keyed by the hash of everything that it depends on: the model's bytes, the evaluation's settings, the data
that it reads, the code of the stage, numerics, seed and the lock. The store lies beside the checkpoints on any fsspec
URL and only saves time: with an empty store the stage writes the same bytes. It keeps the results of the last complete
run of each entry.
"""

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import identity
from tasks.common.harness.job import Job, open_store

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FOLDER = "evaluations"
DAMAGED_FILE_ERRORS = (OSError, EOFError, ValueError)


@dataclass
class ResultStore:
    """The results of one entry; without the job's `parts` nothing is stored."""

    parts: dict[str, Any]
    inputs: dict[str, str]  # hashes by the inputs' names
    filesystem: "AbstractFileSystem | None" = None
    folder: str = ""
    used: set[str] = field(default_factory=set)

    @classmethod
    def for_job(cls, job: Job, parts: tuple[str, ...] = ("code", "numerics", "seed", "lock")) -> "ResultStore":
        """Return the store of a job's entry, keyed by parts of its recipe; raise StageError if it is not writable."""
        if not job.parts:
            return cls({}, {})
        shared = {name: job.parts[name] for name in parts}
        hashes = {name: job.parts["inputs"][str(input_path)] for name, input_path in job.inputs.items()}
        store = cls(shared, hashes, *open_store(job, f"{FOLDER}/{job.name}"))
        job.when_complete.append(store.prune)
        return store

    def get(self, what: Any, inputs: Iterable[str], compute: Callable[[], Any]) -> Any:
        """Return the JSON value of `what`, which depends on the named inputs: a stored one, or a computed one."""
        if self.filesystem is None:
            return compute()
        read = {name: self.inputs[name] for name in sorted(inputs) if name in self.inputs}
        name = f"{identity.hash_json({**self.parts, 'what': what, 'inputs': read})}.json.gz"
        self.used.add(name)
        path = f"{self.folder}/{name}"
        if self.filesystem.exists(path):
            try:
                return json.loads(gzip.decompress(self.filesystem.cat_file(path)))
            except DAMAGED_FILE_ERRORS as error:
                print(f"the stored result {path} is damaged ({error}) and is computed again")
        value = compute()
        # A lone surrogate in a reply survives only as an escape.
        content = gzip.compress(json.dumps(value, ensure_ascii=True, allow_nan=False).encode(), 6)
        self.filesystem.pipe_file(f"{path}.new", content)
        self.filesystem.mv(f"{path}.new", path)
        return value

    def prune(self) -> None:
        """Delete results that the complete run did not use. A failure is only reported."""
        if self.filesystem is None:
            return
        try:
            self.filesystem.invalidate_cache()
            for path in self.filesystem.ls(self.folder, detail=False):
                if Path(path).name not in self.used:
                    self.filesystem.rm(path)
        except OSError as error:
            print(f"old results in {self.folder} could not be deleted ({error})")
