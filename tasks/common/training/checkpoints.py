"""Checkpoint store: saves training state so that an interrupted stage can resume, on any fsspec URL.

The store is keyed by the recipe hash. Any worker can resume a stage. A changed setting, input or line of code gives
another recipe, so a stage never resumes from the checkpoint of a different one. A checkpoint is a safetensors file and
a JSON file, written to a staging folder and then renamed. The store holds only the latest checkpoint and deletes it
when the stage is complete.
"""

import hashlib
import json
import platform
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import Job, StageError, open_store
from tasks.common.training.parallel import World, full_tensor, shard_like

if TYPE_CHECKING:
    import torch
    from fsspec import AbstractFileSystem

    from tasks.common.training.loop import History
    from tasks.common.training.updates import TrainEngine

CHECKPOINT_FILES = ("state.safetensors", "state.json")
MODEL_PREFIX, OPTIMIZER_PREFIX, EXTRA_PREFIX = "model.", "optimizer.", "kept."


@dataclass(frozen=True)
class ExtraState:
    """State that a stage saves besides its model and optimizers: named groups of tensors, and JSON metadata."""

    weights: "dict[str, dict[str, torch.Tensor]]" = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def sharded_like(self, group: str, like: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Return a group's tensors, each sharded like the tensor of the same name in `like`, in the order of `like`.

        The order in a file is arbitrary, and sharding is a collective call: all processes must use the same order.
        """
        tensors = self.weights.get(group, {})
        return {name: shard_like(tensors[name], other) for name, other in like.items() if name in tensors}


NO_EXTRA = ExtraState()


@dataclass(frozen=True)
class Checkpoint:
    """The state that a run resumes from: its step and its optimizers' state. The weights are already in the model."""

    step: int
    moments: "dict[str, torch.Tensor]"
    counters: list[Any]  # from `updates.TrainEngine.state`
    extra: ExtraState


@dataclass
class CheckpointStore:
    """The checkpoints of one stage under one recipe."""

    filesystem: "AbstractFileSystem"
    folder: str
    every_seconds: float
    world: World
    last_saved: float = field(default_factory=time.monotonic)

    @classmethod
    def for_job(cls, job: Job, world: World) -> "CheckpointStore":
        """Return the store of a job's recipe; raise StageError if it is not writable."""
        filesystem, folder = open_store(job, f"{job.name}/{job.recipe}")
        store = cls(filesystem, folder, job.checkpoints.every_seconds, world)
        job.when_complete.append(store.clear)
        return store

    def clear(self) -> None:
        """Delete the stage's checkpoints. A failure is only reported, because the outputs are already in place."""
        try:
            if self.filesystem.exists(self.folder):
                self.filesystem.rm(self.folder, recursive=True)
        except OSError as error:
            print(f"the checkpoints in {self.folder} could not be deleted ({error}); they are no longer needed")

    def resume(self, model: "torch.nn.Module", history: "History") -> Checkpoint | None:
        """Load the latest checkpoint into model and history, and return it for the optimizers; None without one.

        Raises StageError if the checkpoint is damaged, if its tensors do not match the model's trainable weights, or if
        the processes find different checkpoints.
        """
        complete = sorted(name for name in self._folders() if self._complete(name))
        step = int(complete[-1]) if complete else 0
        if self.world.broadcast(step) != step:
            raise StageError(
                f"this process found the checkpoint of step {step} in {self.folder}, and the first process found "
                "another one. All machines of a run need the same store: set placement.checkpoints.url to a URL that "
                "each of them can reach."
            )
        if not complete:
            return None
        folder = f"{self.folder}/{complete[-1]}"
        tensors, state = self._read(folder)
        weights = _select_prefix(MODEL_PREFIX, tensors)
        trained = trainable_weights(model)  # tied weights are stored once, frozen ones not at all
        self._check_tensors(folder, weights, trained)
        for name, value in trained.items():
            value.copy_(weights[name])
        history.rows, history.pending = state["rows"], state["pending"]
        print(f"resuming at step {step} from {folder}")
        groups = {name: _select_prefix(f"{EXTRA_PREFIX}{name}.", tensors) for name in state["kept"]}
        return Checkpoint(
            step, _select_prefix(OPTIMIZER_PREFIX, tensors), state["groups"], ExtraState(groups, state["notes"])
        )

    def _read(self, folder: str) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
        """Return a checkpoint's tensors and JSON state; raise StageError if the checksum does not match."""
        from safetensors.torch import load

        content, text = (self.filesystem.cat_file(f"{folder}/{name}") for name in CHECKPOINT_FILES)
        try:
            state = json.loads(text)
        except ValueError:
            state = {}
        if state.get("sha256") != hashlib.sha256(content).hexdigest():
            raise StageError(
                f"the checkpoint {folder} is damaged: its checksum does not match. Remove that folder to start from "
                "step 0, or restore an intact copy."
            )
        return load(content), state

    def save(
        self, step: int, engine: "TrainEngine", history: "History", extra: ExtraState = NO_EXTRA, *, force: bool = False
    ) -> None:
        """Write a checkpoint if `every_seconds` have passed, or if `force`, and delete the previous one."""
        if not self.world.broadcast(force or time.monotonic() - self.last_saved >= self.every_seconds):
            return
        from safetensors.torch import save

        moments, groups = engine.state()
        tensors = {MODEL_PREFIX + name: value for name, value in engine.weights().items()}
        tensors |= {OPTIMIZER_PREFIX + name: value for name, value in moments.items()}
        for group, weights in extra.weights.items():
            tensors |= {f"{EXTRA_PREFIX}{group}.{name}": full_tensor(value) for name, value in weights.items()}
        self.last_saved = time.monotonic()
        if self.world.rank:
            return
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        state: dict[str, Any] = {"rows": history.rows, "pending": history.pending, "groups": groups}
        state |= {"kept": list(extra.weights), "notes": extra.metadata, "sha256": hashlib.sha256(content).hexdigest()}
        try:
            self._write(step, content, json.dumps(state).encode())
        except FileNotFoundError as error:  # another run of the same stage deletes checkpoints that it has passed
            print(f"the checkpoint of step {step} was not saved, because another run uses {self.folder} ({error})")

    def _write(self, step: int, *contents: bytes) -> None:
        """Write a checkpoint's files to a staging folder, move that into place, and delete older checkpoints.

        Each worktree has a staging folder of its own, used by one stage at a time. Leftovers of a killed process are
        overwritten.
        """
        older, target = self._folders(), f"{self.folder}/{step:09d}"
        worktree_hash = hashlib.sha256(f"{platform.node()}:{Path.cwd()}".encode()).hexdigest()
        staging = f"{self.folder}/.{worktree_hash[:12]}"
        self.filesystem.makedirs(staging, exist_ok=True)
        for name, content in zip(CHECKPOINT_FILES, contents, strict=True):
            self.filesystem.pipe_file(f"{staging}/{name}", content)
        if step in map(int, older):  # an incomplete move, or the same step written again
            self._delete(target)
            older.remove(Path(target).name)
        self.filesystem.mv(staging, target, recursive=True)
        for other in older:
            self._delete(f"{self.folder}/{other}")

    def _delete(self, folder: str) -> None:
        """Delete a checkpoint. Another run that shares the store may have deleted it already."""
        with suppress(FileNotFoundError):
            self.filesystem.rm(folder, recursive=True)

    @staticmethod
    def _check_tensors(folder: str, found: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]") -> None:
        """Raise StageError naming the first tensor that is missing, unexpected or of another shape."""
        for name in sorted(found.keys() | expected.keys()):
            shapes = [tuple(side[name].shape) if name in side else None for side in (found, expected)]
            if shapes[0] != shapes[1]:
                raise StageError(
                    f"the checkpoint {folder} does not match these settings: {name} is {shapes[0] or 'missing'} in the "
                    f"checkpoint and {shapes[1] or 'not trained'} in the model. Remove that folder to start from step "
                    "0, or restore the settings that it was made with."
                )

    def _folders(self) -> list[str]:
        self.filesystem.invalidate_cache()
        if not self.filesystem.exists(self.folder):
            return []
        names = (Path(path).name for path in self.filesystem.ls(self.folder, detail=False))
        return [name for name in names if name.isdigit()]

    def _complete(self, folder: str) -> bool:
        """Return whether a checkpoint has both its files: moving a folder is atomic on a local disk only."""
        return all(self.filesystem.exists(f"{self.folder}/{folder}/{name}") for name in CHECKPOINT_FILES)


def trainable_weights(model: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    """Return the weights that require a gradient, detached. Frozen ones are loaded again from their source."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _select_prefix(prefix: str, tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
