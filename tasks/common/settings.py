"""Settings: the frozen models that `params.yaml` is read into, and the check that reports every problem at once.

A stage's `Config` derives from `Settings`. No field has a default, because `params.yaml` is the whole truth: a key
that is missing, unknown or out of range is an error, and all of them are told before anything runs.
"""

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

STAGES = (
    "ingest", "validate", "tokenize", "pretrain", "finetune", "reward", "ppo", "prune", "quantize", "evaluate",
    "compare", "package",
)  # fmt: skip
Service = Literal["dvclive", "tensorboard", "wandb", "mlflow"]


class BessemerError(Exception):
    """A failure that is the user's to mend; its text is a sentence and is printed without a traceback."""


class SettingsError(BessemerError):
    """Every problem found in `params.yaml`, one a line."""


class Settings(BaseModel):
    """A frozen group of settings in which an unknown key, a missing key and a wrong type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Base(Settings):
    """What every stage shares."""

    seed: int = Field(description="Seed of every generator in the chain", ge=0, lt=2**31)


class Dtypes(Settings):
    """Autocast types of forward and backward passes; small encoders are both faster and better in float32 on a CPU."""

    decoder: Literal["float32", "bfloat16"] = Field(description="Type of causal models")
    encoder: Literal["float32", "bfloat16"] = Field(description="Type of masked models and of what is built on them")


ZERO = {"zero2": 2, "zero3": 3}  # DeepSpeed's engine: its stage
IN_STEP = ("fsdp", *ZERO)


class Parallel(Settings):
    """How many processes train a model together, and how they share it."""

    processes: int = Field(description="Processes; each computes with `threads` threads, or on a GPU of its own", ge=1)
    engine: Literal["data", "fsdp", "zero2", "zero3", "tensor"] = Field(
        description="data: the whole model in each; fsdp: weights and the optimizer's state shared out, each process "
        "reads a part of a batch; zero2 and zero3: DeepSpeed's, without and with the weights shared out; tensor: a "
        "part of every matrix in each, which all read the same (decoders)"
    )

    @field_validator("engine")
    @classmethod
    def _installed(cls, engine: str) -> str:
        """Refuse an engine that would only be missed when training starts."""
        if engine in ZERO and importlib.util.find_spec("deepspeed") is None:
            remedy = "`pip install -c requirements.lock -e '.[deepspeed]'` brings it"
            raise ValueError(f"deepspeed is not installed: {remedy}")
        return engine

    @property
    def in_step(self) -> bool:
        """Whether weights come from the other processes for a pass, so that all must make as many."""
        return self.processes > 1 and self.engine in IN_STEP


class Numerics(Settings):
    """Settings that change the bytes of a result although they describe how it is computed; part of the identity."""

    device: Literal["cpu", "cuda"] = Field(description="Device class that stages compute on")
    threads: int = Field(description="Threads of one stage's matrix operations", ge=1, le=256)
    dtype: Dtypes
    attention: Literal["eager", "sdpa"] = Field(
        description="Attention kernel; eager is faster on a CPU at short lengths"
    )
    compile: Literal["never", "auto", "always"] = Field(
        description="torch.compile of training steps, but for heads and reward models: auto where a run is long "
        "enough to win its time back"
    )
    recompute: bool = Field(
        description="Activation checkpointing: blocks are worked out again backwards: less memory, a third more work"
    )
    parallel: Parallel


def known_address(url: str) -> str:
    """Return the address, or raise ValueError where fsspec knows no such scheme or lacks a package for it."""
    from fsspec import available_protocols, get_filesystem_class

    for part in url.split("::") if "::" in url or "://" in url else ():
        scheme = part.partition("://")[0]
        if scheme not in available_protocols():
            raise ValueError(
                f"fsspec knows no scheme {scheme!r}; give a path, or an address such as file:///mnt/folder"
            )
        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            raise ValueError(f"{scheme}:// needs a package that is not installed: {error}") from error
    return url


class Checkpoints(Settings):
    """Where interrupted training is taken up from."""

    url: str = Field(description="Any fsspec address; a relative path lies in the project", min_length=1)
    every_seconds: float = Field(description="Seconds between two checkpoints of one stage", gt=0)

    @field_validator("url")
    @classmethod
    def _known(cls, url: str) -> str:
        """Refuse a scheme that would only be missed when the first checkpoint is due."""
        return known_address(url)


class Tracking(Settings):
    """Where a training stage's figures can be watched while it runs; see `tasks/common/training/tracking.py`."""

    to: list[Service] = Field(description="Services that they are written for; none where it is empty")
    every: int = Field(description="Steps between two points of a curve", ge=1)

    @field_validator("to")
    @classmethod
    def _installed(cls, to: list[Service]) -> list[Service]:
        """Refuse a service that would only be missed when training starts."""
        if len(set(to)) < len(to):
            raise ValueError("each service should be named once")
        for service in to:
            if importlib.util.find_spec(service) is None:
                # an extra, so that pip keeps to the pinned set: by itself it would move some of that
                remedy = f"`pip install -c requirements.lock -e '.[{service}]'` brings it"
                raise ValueError(f"{service} is not installed: {remedy}")
        return to


class Placement(Settings):
    """Where things run. Neither tracked by DVC nor part of the identity."""

    side_by_side: int = Field(description="Independent stages that run at the same time", ge=1, le=64)
    cost_per_hour: float = Field(description="Price of this machine in currency units an hour, for the report", ge=0)
    currency: str = Field(description="Name of that currency", min_length=1)
    enough_rankings: int = Field(description="New rankings for which `rankings/poll` runs the chain", ge=1)
    checkpoints: Checkpoints
    tracking: Tracking


def read_params(path: Path = Path("params.yaml")) -> dict[str, Any]:
    """Return the raw contents of `params.yaml`; raise SettingsError where it is missing or no YAML mapping."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.exists():
        raise SettingsError(
            f"{path} is missing: go to the project's folder, or write it with `bessemer profile default`."
        )
    try:
        params = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(params, dict):
        raise SettingsError(
            f"{path} must hold one section a stage ({', '.join(STAGES)}) and base, numerics, placement."
        )
    return params


def stage_keys(module: ModuleType) -> dict[str, type[Settings]]:
    """Config class by key, for a stage whose section in `params.yaml` holds one subsection a key; else empty."""
    keys: dict[str, type[Settings]] = getattr(module, "KEYS", {})
    return keys


def config_of(module: ModuleType, params: dict[str, Any], key: str | None) -> tuple[str, Settings]:
    """Return the section name (`pretrain.clm`) and the config that a stage gets; call `check` first."""
    stage = module.__name__.rpartition(".")[2]
    keys = stage_keys(module)
    if keys and key is not None:
        return f"{stage}.{key}", keys[key].model_validate(params[stage][key])
    return stage, module.Config.model_validate(params[stage])


def check(params: dict[str, Any], name: str = "params.yaml", stages: Iterable[str] = ()) -> None:
    """Raise SettingsError with every problem in the file (which is called `name`), or return.

    With `stages` (`quantize@policy`), also what keeps these from running although the settings are sound.

    Stage modules are imported by name, not statically: another stage's settings never change this stage's bytes,
    so its code must not enter this stage's recipe.
    """
    from tasks.common import consistency

    problems: list[str] = []
    expected = {"base", "numerics", "placement", *STAGES}
    unknown = [section for section in params if section not in expected]
    problems += [f"{section}: unknown section; there are {', '.join(sorted(expected))}" for section in unknown]
    problems += [f"{section}: this section is missing" for section in sorted(expected) if section not in params]
    shared: dict[str, type[Settings]] = {"base": Base, "numerics": Numerics, "placement": Placement}
    for section, model in shared.items():
        problems += _problems(model, params, (section,))
    for section in STAGES:
        module = importlib.import_module(f"tasks.{section}")
        keys = stage_keys(module)
        if not keys:
            problems += _problems(module.Config, params, (section,))
            continue
        content = params.get(section)
        if isinstance(content, dict):
            odd = [key for key in content if key not in keys]
            problems += [f"{section}.{key}: unknown key; there are {', '.join(keys)}" for key in odd]
        for key, model in keys.items():
            problems += _problems(model, params, (section, key))
    problems += consistency.of_settings(params)
    problems += consistency.of_stages(params, stages)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise SettingsError(f"{name} has {count}; nothing was run.\n{listed}")


def _problems(model: type[Settings], params: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    value: Any = params
    for name in path:
        if not isinstance(value, dict) or name not in value:
            if len(path) > 1:
                yield f"{'.'.join(path)}: this section is missing"
            return
        value = value[name]
    try:
        model.model_validate(value)
    except ValidationError as error:
        for item in error.errors():
            yield _sentence(model, path, value, item)


def _sentence(model: type[Settings], path: tuple[str, ...], value: Any, item: Any) -> str:
    kind, found = item["type"], item["input"]
    where = ".".join((*path, *_keys(value, item["loc"], absent=kind == "missing")))
    if kind == "missing":
        return f"{where}: this key is missing"
    if kind == "extra_forbidden":
        return f"{where}: unknown key (found {found!r}); there are {_names_beside(model, item['loc'])}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        told = {name: str(text).replace("'", "") for name, text in item["ctx"].items()}
        where = f"{where}.{told['discriminator']}"  # the key that chooses
        if kind == "union_tag_not_found":
            return f"{where}: this key is missing"
        return f"{where}: found {item['ctx']['tag']!r}, but it should be one of {told['expected_tags']}"
    if kind == "value_error" and isinstance(found, dict):  # keys that do not go together, which the rule names
        return f"{where}: {_rule(item['msg'])}"
    return f"{where}: found {_short(found)}, but {_rule(item['msg'])}"


def _names_beside(model: type[Settings], location: tuple[str | int, ...]) -> str:
    """Return the keys that a group of settings has at a location; of a choice, pydantic's names the chosen too."""
    groups = [model]
    for key in location[:-1]:
        fields = [group.model_fields for group in groups]
        inside = [kind for named in fields if key in named for kind in _groups(named[str(key)].annotation)]
        chosen = [
            group for group in groups if any(key in get_args(kind.annotation) for kind in group.model_fields.values())
        ]
        groups = inside or chosen or groups
    return ", ".join(dict.fromkeys(name for group in groups for name in group.model_fields))


def _groups(kind: Any) -> Iterator[type[Settings]]:
    """Yield the groups of settings that a type allows."""
    if isinstance(kind, type) and issubclass(kind, Settings):
        yield kind
    for part in get_args(kind):
        yield from _groups(part)


def _keys(value: Any, location: tuple[str | int, ...], *, absent: bool) -> Iterator[str]:
    """Yield the keys on the way to a problem, as they stand in the file: of a choice, pydantic names the chosen too.

    The last one of a problem that is a key's absence stands nowhere, of course.
    """
    for place, key in enumerate(location):
        inside = key in value if isinstance(value, dict) else isinstance(value, list)
        if inside or (absent and place == len(location) - 1):
            yield str(key)
            value = value[key] if inside else None


def _rule(message: str) -> str:
    message = message.removeprefix("Value error, ").replace("Input should be", "it should be")
    return message[:1].lower() + message[1:] if message[:2] != message[:2].upper() else message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
