"""The pydantic models that `params.yaml` is parsed into.

A stage's `Config` derives from `Settings`. Each field has a description with its unit, bounds and, unless the user must
choose, a default. Defaults are literals, so that a changed default is a code change. An unknown key, a value out of
range and a missing key without a default are errors, and all of them are reported before anything runs.
"""

import importlib
import importlib.util
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

STAGES = (
    "ingest", "validate", "tokenize", "pretrain", "finetune", "reward", "align", "prune", "quantize", "evaluate",
    "compare", "package",
)  # fmt: skip
# The sections of these stages hold named entries, each of which is a DVC stage: `finetune@chat`.
PACKAGE_PARTS = ("chat", "encoder", "classifier")  # the settings of `package` that name a model
ENTRY_STAGES = ("pretrain", "finetune", "reward", "align", "prune", "quantize", "evaluate")
ENTRY_SECTIONS = (*ENTRY_STAGES, "evaluations")  # `evaluations` holds entries that are no stages
Service = Literal["dvclive", "tensorboard", "wandb", "mlflow"]


class BessemerError(Exception):
    """An error that the user can fix; its message is a sentence and is printed without a traceback."""


class SettingsError(BessemerError):
    """All problems found in `params.yaml`, one per line."""


class Settings(BaseModel):
    """A frozen group of settings in which an unknown key, a missing key and a wrong type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Base(Settings):
    """Settings of all stages."""

    seed: int = Field(default=1, description="Seed of every generator in the pipeline", ge=0, lt=2**31)


class Dtypes(Settings):
    """Autocast dtypes of forward and backward passes; on a CPU, small encoders are faster and better in float32."""

    decoder: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Dtype of causal models")
    encoder: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Dtype of masked models and of models trained from them"
    )


ZERO_STAGES = {"zero2": 2, "zero3": 3}  # engine: DeepSpeed's ZeRO stage
LOCKSTEP_ENGINES = ("fsdp", *ZERO_STAGES)


class Parallel(Settings):
    """The number of processes that train a model together, and the parallelism between them."""

    processes: int = Field(
        default=1, description="Processes; each computes with `threads` threads, or on a GPU of its own", ge=1
    )
    engine: Literal["data", "fsdp", "zero2", "zero3", "tensor"] = Field(
        default="data",
        description="data: a full model in each process; fsdp: weights and optimizer states are sharded, and each "
        "process reads a part of a batch; zero2 and zero3: DeepSpeed's engines, without and with sharded weights; "
        "tensor: every matrix is sharded, and all processes read the same batch (decoders only)",
    )

    @field_validator("engine")
    @classmethod
    def _validate_engine(cls, engine: str) -> str:
        """Reject an engine whose package is missing, which would fail only when training starts."""
        if engine in ZERO_STAGES and importlib.util.find_spec("deepspeed") is None:
            remedy = "install it with `pip install -c requirements.lock deepspeed`"
            raise ValueError(f"deepspeed is not installed: {remedy}")
        return engine

    @property
    def lockstep(self) -> bool:
        """Whether a pass gathers weights from the other processes, so that all must run the same number of passes."""
        return self.processes > 1 and self.engine in LOCKSTEP_ENGINES


class Numerics(Settings):
    """Settings of the computation that change the bytes of a result; part of the identity."""

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Device class that stages compute on")
    threads: int = Field(default=1, description="Threads of one stage's matrix operations", ge=1, le=256)
    dtype: Dtypes = Dtypes()
    attention: Literal["eager", "sdpa"] = Field(
        default="sdpa", description="Attention kernel; eager is faster on a CPU at short lengths"
    )
    compile: Literal["never", "auto", "always"] = Field(
        default="auto",
        description="torch.compile of training steps, except for heads and reward models; auto: if the run is long "
        "enough to save more time than compilation takes. A compiled run needs a C++ compiler",
    )
    parallel: Parallel = Parallel()


def validate_url(url: str) -> str:
    """Return the URL; raise ValueError if fsspec does not know its scheme or lacks the package for it."""
    from fsspec import available_protocols, get_filesystem_class

    for part in url.split("::") if "::" in url or "://" in url else ():
        scheme = part.partition("://")[0]
        if scheme not in available_protocols():
            raise ValueError(f"fsspec knows no scheme {scheme!r}; use a path, or a URL such as file:///mnt/folder")
        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            raise ValueError(f"{scheme}:// needs a package that is not installed: {error}") from error
    return url


class Checkpoints(Settings):
    """Where checkpoints are stored, from which interrupted training resumes."""

    url: str = Field(
        default="checkpoints", description="Any fsspec URL; a relative path is relative to the project", min_length=1
    )
    every_seconds: float = Field(default=30.0, description="Seconds between two checkpoints of one stage", gt=0)

    @field_validator("url")
    @classmethod
    def _validate_url(cls, url: str) -> str:
        """Reject an unusable scheme, which would fail only at the first checkpoint."""
        return validate_url(url)


class Tracking(Settings):
    """Experiment trackers of the training stages; see `tasks/common/training/tracking.py`."""

    to: list[Service] = Field(
        default=["dvclive", "tensorboard"], description="Services that figures are logged to; may be empty"
    )
    every: int = Field(default=10, description="Steps between two logged points", ge=1)

    @field_validator("to")
    @classmethod
    def _validate_services(cls, to: list[Service]) -> list[Service]:
        """Reject a service whose package is missing, which would fail only when training starts."""
        if len(set(to)) < len(to):
            raise ValueError("each service should be named once")
        for service in to:
            if importlib.util.find_spec(service) is None:
                # The command installs only this package, with the pinned versions: with the project's own requirements
                # it would also install torchvision.
                package = {"mlflow": "mlflow-skinny"}.get(service, service)
                remedy = f"install it with `pip install -c requirements.lock {package}`"
                raise ValueError(f"{service} is not installed: {remedy}")
        return to


class Timeouts(Settings):
    """How long a stage waits for external services before it fails; its last checkpoint is kept."""

    reward_seconds: float = Field(default=600.0, gt=0, description="Seconds for one call of a reward function or URL")
    vllm_seconds: float = Field(default=600.0, gt=0, description="Seconds for vLLM to start, or to sample an iteration")


class Placement(Settings):
    """Where and how stages run; it changes no byte of a result, is not tracked by DVC and not part of the identity."""

    max_parallel_stages: int = Field(default=1, ge=1, le=64, description="Independent stages that run at the same time")
    activation_checkpointing: bool = Field(
        default=False,
        description="Recompute blocks in the backward pass: less memory, a third more computation, same bytes; not in "
        "a compiled run, whose result it would change",
    )
    timeouts: Timeouts = Timeouts()
    timed_tokens: int = Field(default=96, ge=8, description="Tokens decoded to compare the speed of INT8 and FP32")
    cost_per_hour: float = Field(
        default=0.0, description="Price of this machine in currency units an hour, for the report", ge=0
    )
    currency: str = Field(default="USD", description="Name of that currency", min_length=1)
    min_new_rankings: int = Field(default=20, description="Number of new rankings that starts an automatic run", ge=1)
    checkpoints: Checkpoints = Checkpoints()
    tracking: Tracking = Tracking()
