"""The checkpoint store: where an interrupted stage is taken up again, on any fsspec address.

It is keyed by the recipe hash: any worker can resume a stage, and none can resume another's, because a changed
setting, input or line of code is another recipe. Checkpoints are safetensors and JSON, written to a neighbour and
renamed, and only the last one is kept until the stage is complete.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.stage import Job, StageError

if TYPE_CHECKING:
    import torch
    from fsspec import AbstractFileSystem

    from tasks.common.training import History

FILES = ("state.safetensors", "state.json")


@dataclass
class Store:
    """The checkpoints of one stage's recipe."""

    filesystem: "AbstractFileSystem"
    folder: str
    every_seconds: float
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, job: Job) -> "Store":
        """Return the store that belongs to a job's recipe; raise StageError where nothing can be written there."""
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(job.checkpoints.url)
        store = cls(filesystem, f"{path.rstrip('/')}/{job.name}/{job.recipe}", job.checkpoints.every_seconds)
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

    def resume(self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", history: "History") -> int:
        """Load the last checkpoint into model, optimizer and history, and return its step; 0 where there is none."""
        from safetensors.torch import load

        complete = sorted(name for name in self._folders() if self._complete(name))
        if not complete:
            return 0
        folder = f"{self.folder}/{complete[-1]}"
        tensors = load(self.filesystem.cat_file(f"{folder}/state.safetensors"))
        state = json.loads(self.filesystem.cat_file(f"{folder}/state.json"))
        weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        model.load_state_dict(weights, strict=False)  # tied weights are stored once
        optimizer.load_state_dict(_unflatten(optimizer.state_dict(), tensors))
        history.rows, history.pending = state["rows"], state["pending"]
        print(f"resuming at step {int(complete[-1])} from {folder}")
        return int(complete[-1])

    def keep(self, step: int, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer", history: "History") -> None:
        """Write a checkpoint if it is time for one, and drop the one before it."""
        if time.monotonic() - self.last < self.every_seconds:
            return
        from safetensors.torch import save

        older = self._folders()
        target, neighbour = f"{self.folder}/{step:09d}", f"{self.folder}/.{step:09d}"
        self.filesystem.makedirs(neighbour, exist_ok=True)
        tensors = {f"model.{name}": value for name, value in _untied(model).items()} | _flatten(optimizer.state_dict())
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        self.filesystem.pipe_file(f"{neighbour}/state.safetensors", content)
        text = json.dumps({"rows": history.rows, "pending": history.pending})
        self.filesystem.pipe_file(f"{neighbour}/state.json", text.encode())
        if step in map(int, older):  # half a move that was cut short
            self.filesystem.rm(target, recursive=True)
            older.remove(Path(target).name)
        self.filesystem.mv(neighbour, target, recursive=True)
        for other in older:
            self.filesystem.rm(f"{self.folder}/{other}", recursive=True)
        self.last = time.monotonic()

    def _folders(self) -> list[str]:
        self.filesystem.invalidate_cache()
        if not self.filesystem.exists(self.folder):
            return []
        names = (Path(path).name for path in self.filesystem.ls(self.folder, detail=False))
        return [name for name in names if name.isdigit()]

    def _complete(self, folder: str) -> bool:
        """Return whether a checkpoint has both its files: only a local disk moves a folder in one go."""
        return all(self.filesystem.exists(f"{self.folder}/{folder}/{name}") for name in FILES)


def _untied(model: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _flatten(state: dict[str, Any]) -> dict[str, "torch.Tensor"]:
    import torch

    slots = ((index, name, value) for index, values in state["state"].items() for name, value in values.items())
    return {f"optimizer.{index}.{name}": torch.as_tensor(value) for index, name, value in slots}


def _unflatten(state: dict[str, Any], tensors: dict[str, "torch.Tensor"]) -> dict[str, Any]:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for path, value in tensors.items():
        if path.startswith("optimizer."):
            _, index, name = path.split(".", 2)
            slots.setdefault(int(index), {})[name] = value
    return {"state": slots, "param_groups": state["param_groups"]}
