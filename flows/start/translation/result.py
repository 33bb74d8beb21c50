"""The result of a translation, and how numbers of epochs become numbers of steps."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Tool = Literal["llamafactory", "axolotl"]
CHECKPOINT = "models/checkpoint"  # stands for the path of the checkpoint in `sections`; `bessemer init` replaces it
MAX_WARMUP = 0.5  # the largest share that a schedule accepts
MAX_HELDOUT = {"entities": 0.9, "prose": 0.5, "rankings": 0.5}  # the largest shares that `ingest.heldout` accepts


@dataclass(frozen=True)
class Line:
    """A setting that is not translated: what was found, why it is not, and what to do instead."""

    setting: str
    value: Any
    why: str
    instead: str

    def __str__(self) -> str:
        shown = str(self.value)
        return f"{self.setting}: {shown if len(shown) <= 60 else f'{shown[:57]}...'} – {self.why}; {self.instead}"


@dataclass
class Draft:
    """A translation while it is made."""

    notes: list[str] = field(default_factory=list)
    untranslated: list[Line] = field(default_factory=list)
    epochs: dict[str, float] = field(default_factory=dict)
    warmup_steps: dict[str, int] = field(default_factory=dict)
    heldout_rows: dict[str, int] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)

    def leave(self, setting: str, value: Any, why: str, instead: str) -> None:
        """Name a setting as not translated."""
        self.untranslated.append(Line(setting, value, why, instead))


@dataclass(frozen=True)
class Source:
    """An item of `ingest.sources`, whose paths are those that its files get under `data/sources/`."""

    settings: Mapping[str, Any]
    copies: Mapping[str, Path]  # path under data/sources/: absolute path of the file to copy there
    texts: Mapping[str, str] = field(default_factory=dict)  # path under data/sources/: content of a file to write there


@dataclass(frozen=True)
class Translation:
    """What a project's `params.yaml` takes over from another tool's configuration.

    `sections` lack `steps` (in an entry of `align`, `iterations`) where the file gives epochs: `with_steps` adds them.
    """

    tool: Tool
    decided_by: tuple[str, ...]  # the keys of the file that only this tool has
    checkpoint: Path | None  # folder of the model to start from; None where the file names none on this machine
    adapter: Path | None  # folder of a PEFT adapter that belongs to the checkpoint
    template: str | None  # the tool's name for the chat template
    sources: tuple[Source, ...]
    sections: Mapping[str, Any]
    epochs: Mapping[str, float]  # entry ("finetune.chat"): passes over its rows
    warmup_steps: Mapping[str, int]  # entry: steps in which the learning rate rises, where the file gives a number
    heldout_rows: Mapping[str, int]  # key of ingest.heldout: rows, where the file gives a number and not a share
    untranslated: tuple[Line, ...]
    without_effect: tuple[str, ...]  # settings of logs, folders, speed and memory: the model does not depend on them
    notes: tuple[str, ...]

    @property
    def entries(self) -> list[str]:
        """The entries of `sections`, such as `finetune.chat`."""
        stages = ("pretrain", "finetune", "reward", "align")
        return [f"{stage}.{name}" for stage in stages for name in self.sections.get(stage, {})]

    def with_steps(self, amounts: Mapping[str, int]) -> dict[str, Any]:
        """Return the sections with steps instead of epochs.

        `amounts` has the size of what an entry is trained on: conversations, rankings (of DPO and reward models) or
        prompts (of PPO), and for an entry of `pretrain` the tokens of the corpus.
        """
        sections = copy.deepcopy(dict(self.sections))
        for where in self.entries:
            stage, _, name = where.partition(".")
            entry = sections[stage][name]
            counter = "iterations" if stage == "align" else "steps"
            if where in self.epochs:
                entry[counter] = max(1, math.ceil(self.epochs[where] * amounts[where] / _amount_per_step(stage, entry)))
            if where in self.warmup_steps:
                updates = entry[counter] * _updates_per_iteration(entry)
                entry["optimizer"]["schedule"]["warmup"] = _share(self.warmup_steps[where], updates, MAX_WARMUP)
            for key, rows in self.heldout_rows.items():
                sections["ingest"] = {"heldout": {key: _share(rows, amounts[where], MAX_HELDOUT[key])}}
        return sections


def _share(part: int, whole: int, largest: float) -> float:
    return min(largest, round(part / max(whole, 1), 4))


def _amount_per_step(stage: str, entry: Mapping[str, Any]) -> float:
    """Return the rows (in an entry of `pretrain`, tokens) of a step, or of an iteration of `align`."""
    if stage == "pretrain":
        return float(entry["batch"] * entry["window"])
    if stage == "align":
        return float(entry["episodes"] / (2 if entry["algorithm"]["name"] == "dpo" else 1))
    return float(entry["batch"])


def _updates_per_iteration(entry: Mapping[str, Any]) -> int:
    """Return the optimizer's updates in an iteration of `align`; 1 for another entry, whose steps are updates."""
    return int(entry["episodes"] // entry["minibatch"]) if entry.get("algorithm", {}).get("name") == "dpo" else 1
