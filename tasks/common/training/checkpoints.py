"""The checkpoint store: where an interrupted stage is taken up again, on any fsspec address.

It is keyed by the recipe hash: any worker can resume a stage, and none can resume another's, because a changed
setting, input or line of code is another recipe. Checkpoints are safetensors and JSON, written to a neighbour and
renamed, and only the last one is kept until the stage is complete.
"""

import hashlib
import json
import platform
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.stage import Job, StageError
from tasks.common.training.parallel import World, placed_like, whole

if TYPE_CHECKING:
    import torch
    from fsspec import AbstractFileSystem

    from tasks.common.training.loop import History
    from tasks.common.training.updates import Updates

FILES = ("state.safetensors", "state.json")
MODEL, OPTIMIZER, KEPT = "model.", "optimizer.", "kept."


@dataclass(frozen=True)
class Kept:
    """What a stage keeps beside its model and optimizers: named groups of weights, and notes that JSON can hold."""

    weights: "dict[str, dict[str, torch.Tensor]]" = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def placed(self, group: str, like: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Return a group's weights shared out as others of the same names are, in the order of those.

        A file has none, and all processes must ask for the pieces of the same tensor.
        """
        found = self.weights.get(group, {})
        return {name: placed_like(found[name], other) for name, other in like.items() if name in found}


NOTHING = Kept()


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: its step, and what its optimizers remember and count."""

    step: int
    moments: "dict[str, torch.Tensor]"
    counters: list[Any]  # whatever the engine's `updates.Updates.state` gave
    kept: Kept


@dataclass
class Store:
    """The checkpoints of one stage's recipe."""

    filesystem: "AbstractFileSystem"
    folder: str
    every_seconds: float
    world: World
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, job: Job, world: World) -> "Store":
        """Return the store that belongs to a job's recipe; raise StageError where nothing can be written there."""
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(job.checkpoints.url)
        store = cls(filesystem, f"{path.rstrip('/')}/{job.name}/{job.recipe}", job.checkpoints.every_seconds, world)
        try:
            filesystem.makedirs(store.folder, exist_ok=True)
        except OSError as error:
            raise StageError(
                f"checkpoints cannot be written to {job.checkpoints.url} ({error}); mend that, or change "
                "placement.checkpoints.url in params.yaml."
            ) from error
        job.when_complete.append(store.clear)
        return store

    def clear(self) -> None:
        """Drop the stage's checkpoints: its outputs are in place, whether that succeeds or not."""
        try:
            if self.filesystem.exists(self.folder):
                self.filesystem.rm(self.folder, recursive=True)
        except OSError as error:
            print(f"the checkpoints in {self.folder} could not be dropped ({error}); nobody needs them any more")

    def resume(self, model: "torch.nn.Module", history: "History") -> Checkpoint | None:
        """Load the last checkpoint into model and history, and return it for the optimizers; None where there is none.

        Raises StageError where its tensors are not those that the model trains, where it is not what was written, or
        where processes see different ones.
        """
        complete = sorted(name for name in self._folders() if self._complete(name))
        step = int(complete[-1]) if complete else 0
        if self.world.told(step) != step:
            raise StageError(
                f"the first process goes on from another checkpoint than this one, which finds step {step} in "
                f"{self.folder}: all machines that train together need one store, so set placement.checkpoints.url to "
                "an address that each of them reaches."
            )
        if not complete:
            return None
        folder = f"{self.folder}/{complete[-1]}"
        tensors, state = self._read(folder)
        weights = _under(MODEL, tensors)
        trained = trained_weights(model)  # tied ones are stored once, frozen ones not at all
        self._must_fit(folder, weights, trained)
        for name, value in trained.items():
            value.copy_(weights[name])
        history.rows, history.pending = state["rows"], state["pending"]
        print(f"resuming at step {step} from {folder}")
        groups = {name: _under(f"{KEPT}{name}.", tensors) for name in state["kept"]}
        return Checkpoint(step, _under(OPTIMIZER, tensors), state["groups"], Kept(groups, state["notes"]))

    def _read(self, folder: str) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
        """Return a checkpoint's tensors and state; raise StageError where a disk or a copy has spoilt them."""
        from safetensors.torch import load

        content, text = (self.filesystem.cat_file(f"{folder}/{name}") for name in FILES)
        try:
            state = json.loads(text)
        except ValueError:
            state = {}
        if state.get("sha256") != hashlib.sha256(content).hexdigest():
            raise StageError(
                f"the checkpoint {folder} is damaged: its files are not those that were written. Remove that folder to "
                "begin anew, or bring back a whole copy."
            )
        return load(content), state

    def keep(
        self, step: int, updates: "Updates", history: "History", kept: Kept = NOTHING, *, now: bool = False
    ) -> None:
        """Write a checkpoint if it is time for one, or `now`, and drop the one before it."""
        if not self.world.told(now or time.monotonic() - self.last >= self.every_seconds):
            return
        from safetensors.torch import save

        moments, groups = updates.state()
        tensors = {MODEL + name: value for name, value in updates.weights().items()}
        tensors |= {OPTIMIZER + name: value for name, value in moments.items()}
        for group, weights in kept.weights.items():
            tensors |= {f"{KEPT}{group}.{name}": whole(value) for name, value in weights.items()}
        self.last = time.monotonic()
        if self.world.rank:
            return
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        state: dict[str, Any] = {"rows": history.rows, "pending": history.pending, "groups": groups}
        state |= {"kept": list(kept.weights), "notes": kept.notes, "sha256": hashlib.sha256(content).hexdigest()}
        try:
            self._write(step, content, json.dumps(state).encode())
        except FileNotFoundError as error:  # the same stage is at work elsewhere, and drops what is behind it
            print(f"the checkpoint of step {step} was not kept, since another run shares {self.folder} ({error})")

    def _write(self, step: int, *contents: bytes) -> None:
        """Write a checkpoint's files to a neighbour, move that into place, and drop older ones.

        The neighbour is the project's own, in which a stage works alone: what a kill leaves there is written over.
        """
        older, target = self._folders(), f"{self.folder}/{step:09d}"
        project = hashlib.sha256(f"{platform.node()}:{Path.cwd()}".encode()).hexdigest()
        neighbour = f"{self.folder}/.{project[:12]}"
        self.filesystem.makedirs(neighbour, exist_ok=True)
        for name, content in zip(FILES, contents, strict=True):
            self.filesystem.pipe_file(f"{neighbour}/{name}", content)
        if step in map(int, older):  # half a move that was cut short, or the same step once more
            self._drop(target)
            older.remove(Path(target).name)
        self.filesystem.mv(neighbour, target, recursive=True)
        for other in older:
            self._drop(f"{self.folder}/{other}")

    def _drop(self, folder: str) -> None:
        """Remove a checkpoint, which another run that shares the store may have removed first."""
        with suppress(FileNotFoundError):
            self.filesystem.rm(folder, recursive=True)

    @staticmethod
    def _must_fit(folder: str, found: "dict[str, torch.Tensor]", wanted: "dict[str, torch.Tensor]") -> None:
        """Refuse a checkpoint of another model by the first tensor that tells."""
        for name in sorted(found.keys() | wanted.keys()):
            sizes = [tuple(side[name].shape) if name in side else None for side in (found, wanted)]
            if sizes[0] != sizes[1]:
                raise StageError(
                    f"the checkpoint {folder} does not fit these settings: {name} is {sizes[0] or 'missing'} there and "
                    f"{sizes[1] or 'not trained'} here. Remove that folder to begin anew, or bring back the settings "
                    "that it was made with."
                )

    def _folders(self) -> list[str]:
        self.filesystem.invalidate_cache()
        if not self.filesystem.exists(self.folder):
            return []
        names = (Path(path).name for path in self.filesystem.ls(self.folder, detail=False))
        return [name for name in names if name.isdigit()]

    def _complete(self, folder: str) -> bool:
        """Return whether a checkpoint has both its files: only a local disk moves a folder in one go."""
        return all(self.filesystem.exists(f"{self.folder}/{folder}/{name}") for name in FILES)


def trained_weights(model: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    """Return the weights that training changes; the others come from where they came from."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _under(prefix: str, tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
