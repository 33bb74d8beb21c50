"""The interface between the harness and a stage: names, paths, declared inputs and outputs, and the `Job`."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.common.settings import ENTRY_STAGES, BessemerError, Checkpoints, Numerics, Timeouts, Tracking

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

RUNS_FOLDER = Path("runs")


class StageError(BessemerError):
    """A stage cannot continue, for a reason that the user can fix; the message says what was found and what to do."""


class Link(NamedTuple):
    """An entry of the graph: its name (`align@policy`), the folders that it reads and a reward model's role.

    The first folder is the model that the entry starts from or, for an evaluation, the model that it evaluates.
    """

    name: str
    reads: tuple[str, ...]
    role: str = ""

    @property
    def stage(self) -> str:
        """The stage: `align`."""
        return self.name.partition("@")[0]

    @property
    def key(self) -> str:
        """The entry's own name: `policy`."""
        return self.name.partition("@")[2]

    @property
    def folder(self) -> str:
        """The path of its model, by which other entries refer to it."""
        return f"data/{self.stage}/{self.key}/model"


NO_TRACKING = Tracking(to=[], every=1)  # for a job that `execute` did not create


@dataclass(frozen=True)
class Job:
    """The argument of a stage's `run`: input and output paths, and everything that its results depend on."""

    stage: str
    key: str | None
    inputs: dict[str, Path]
    outputs: dict[str, Path]
    seed: int
    numerics: Numerics
    recipe: str
    checkpoints: Checkpoints
    tracking: Tracking = NO_TRACKING
    run_folder: Path = RUNS_FOLDER / "manual"
    activation_checkpointing: bool = False
    timeouts: Timeouts = field(default_factory=Timeouts)
    timed_tokens: int = 96
    figures: dict[str, Any] = field(default_factory=dict)
    when_complete: list[Callable[[], None]] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)  # validated, those of the module's `SECTIONS`
    parts: dict[str, Any] = field(default_factory=dict)  # of the recipe, by name; `inputs` holds hashes by path
    graph: tuple[Link, ...] = ()  # all entries in graph order, if the stage's module sets `GRAPH`

    @property
    def name(self) -> str:
        """The stage's name in DVC, in the Prefect UI and in every record: `pretrain@causal`."""
        return stage_name(self.stage, self.key)

    def log_figures(self, **figures: float | int | str) -> None:
        """Add figures about this run (speed, memory, time) to its log; they never enter a tracked output."""
        self.figures.update(figures)


def open_store(job: Job, folder: str) -> "tuple[AbstractFileSystem, str]":
    """Return the file system of a job's checkpoints and the path of a folder there, which it creates.

    Raises StageError if the folder is not writable.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(job.checkpoints.url)
    path = f"{root.rstrip('/')}/{folder}"
    try:
        filesystem.makedirs(path, exist_ok=True)
    except OSError as error:
        raise StageError(
            f"{job.checkpoints.url}, the store of checkpoints and finished evaluations, cannot be written to "
            f"({error}); make it writable, or change placement.checkpoints.url in params.yaml."
        ) from error
    return filesystem, path


def stage_name(stage: str, key: str | None) -> str:
    """Return `stage` or `stage@key`."""
    return stage if key is None else f"{stage}@{key}"


def declared_inputs(module: ModuleType, key: str | None, config: Any, links: Sequence[Link]) -> dict[str, str]:
    """Return the project paths of the data that a stage reads, by name.

    A path may contain the entry's name (`{key}`) or a setting (`{config.model}`). Inputs that depend on other entries
    of the graph come from the module's `graph_inputs`.
    """
    inputs = {name: path.format(key=key, config=config) for name, path in module.INPUTS.items()}
    graph_inputs: Callable[[Any, Sequence[Link]], dict[str, str]] | None = getattr(module, "graph_inputs", None)
    return inputs | (graph_inputs(config, links) if graph_inputs else {})


def declared_outputs(module: ModuleType, key: str | None) -> dict[str, str]:
    """Return the project paths of a stage's outputs by name, without its record and metrics."""
    outputs: dict[str, str] = module.OUTPUTS
    return {name: path.format(key=key) for name, path in outputs.items()}


def uses_numerics(module: ModuleType) -> bool:
    """Return whether a stage computes with a model, so that its outputs depend on `numerics`."""
    return bool(getattr(module, "NUMERICS", True))


def record_path(stage: str, key: str | None) -> Path:
    """Return the path of a stage's record."""
    return Path("data", stage, key or "", "record.json")


def metrics_path(stage: str, key: str | None) -> Path:
    """Return the path of a stage's metrics; the table of all models is `metrics/evaluate.json`."""
    return Path("metrics", "evaluate.json" if stage == "compare" else f"{stage_name(stage, key)}.json")


def has_entries(stage: str) -> bool:
    """Return whether a stage's section holds entries, each of which runs separately: `python -m tasks.STAGE ENTRY`."""
    return stage in ENTRY_STAGES


def shared_sections(module: ModuleType) -> tuple[str, ...]:
    """Return the sections of entries that a stage reads besides its own."""
    return tuple(getattr(module, "SECTIONS", ()))


def reads_graph(module: ModuleType) -> bool:
    """Return whether a stage's results depend on how the entries are connected and ordered."""
    return bool(getattr(module, "GRAPH", False))


def module_of(stage: str) -> ModuleType:
    """Import and return the module of a stage's settings and `run`: `tasks/STAGE/stage.py`, or `tasks/STAGE.py`."""
    module = importlib.import_module(f"tasks.{stage}")
    return importlib.import_module(f"tasks.{stage}.stage") if hasattr(module, "__path__") else module


def stage_of(module: ModuleType) -> str:
    """Return the name of a module's stage."""
    return module.__name__.removesuffix(".stage").rpartition(".")[2]
