"""Sampling through vLLM: the requests, errors of the process, and, if vLLM is installed, its replies.

The tests of vLLM itself take some minutes and need the environment made by `make vllm`; the others replace its process
by a script.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.align import rollouts, vllm_worker
from tasks.align.policy import Policy
from tasks.align.rollouts import RolloutError, Vllm, VllmEngine
from tasks.common import identity, params_file
from tasks.common.defaults import read_settings
from tasks.common.generation import sampling
from tasks.common.modelling import models
from tasks.common.random_streams import Stream, derive_seed
from tasks.common.settings import SettingsError, Timeouts
from tasks.common.text import chat
from tests.conftest import ROOT
from tests.stage_processes import clone, run_to_end, start_command, wait_for_step
from tests.training_fixtures import CAPITALS, LORA, NUMERICS, QUESTIONS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

PROMPTS = [[5, 6, 7], [8, 9]]
TOP = {"name": "top_layers", "layers": 1}
# A process in vLLM's place: it writes to its log and runs the test's code.
SCRIPT = """
import json, os, sys, time
from safetensors import safe_open

def sample(weights, prompts, seed, max_new_tokens, temperature, ends):
    with safe_open(os.path.join(weights, "model.safetensors"), "numpy") as file:
        norm = int(abs(file.get_tensor("model.norm.weight")).sum() * 1000)
        head, tied = file.get_tensor("lm_head.weight"), file.get_tensor("model.embed_tokens.weight")
    assert (head == tied).all()
    {sample}

print("began", flush=True)
with os.fdopen(int(sys.argv[1]), "w") as answers:
    for line in sys.stdin:
        name, given = json.loads(line)
        print(f"asked to {{name}}", flush=True)
        answer = {{"done": None if name == "load" else sample(**given)}}
        print(json.dumps(answer), file=answers, flush=True)
"""


@pytest.fixture
def policy(chain: Chain) -> Callable[..., Policy]:
    """Return a factory of policies on the tuned model."""

    def make(method: dict[str, Any] | None = None, values: Any = "shared") -> Policy:
        chosen = config("align@policy", method=method or {"name": "full"}).method
        return Policy.load(chain.path("data/finetune/chat/model"), chosen, values, NUMERICS, 1.0)

    return make


def perturb(policy: Policy) -> Policy:
    """Add a little noise to the trainable weights and return the policy."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.mark.parametrize("method", [{"name": "full"}, TOP, LORA])
@pytest.mark.parametrize("values", ["shared", "separate"])
def test_merged_state_dict_equals_the_saved_model(
    method: dict[str, Any], values: str, policy: Callable[..., Policy], chain: Chain
) -> None:
    """It has the plain model's names, no head or critic, tied weights twice; the policy stays in training."""
    import torch

    ours, path = perturb(policy(method, values)), chain.path("data/finetune/chat/model")
    trained = {name: value.clone() for name, value in ours.model.named_parameters() if value.requires_grad}
    merged = ours.merged_state_dict(path)
    after = {name: value for name, value in ours.model.named_parameters() if value.requires_grad}
    assert all((after[name] == value).all() for name, value in trained.items())
    assert after.keys() == trained.keys()
    plain = ours.merged_model(path, ours.model).state_dict()
    assert merged.keys() == plain.keys() == models.load_decoder(path, NUMERICS).state_dict().keys()
    assert all(torch.equal(merged[name], value) for name, value in plain.items())


# A process in vLLM's place


@pytest.fixture
def engine(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., VllmEngine]]:
    """Return a factory of engines whose process runs a script that samples by the given code."""
    workers: list[VllmEngine] = []

    def make(sample: str, timeout: float = 60.0) -> VllmEngine:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(sample=sample), encoding="utf-8")
        monkeypatch.setattr(vllm_worker, "__file__", str(script))
        monkeypatch.setattr(rollouts, "vllm_python", lambda: Path(sys.executable))
        job = chain.job(
            "align@policy",
            config("align@policy"),
            tmp_path / "outputs",
            run_folder=tmp_path / "run",
            timeouts=Timeouts(vllm_seconds=timeout),
        )
        chosen = Vllm.model_construct(name="vllm", version="1", cache_mb=8)
        workers.append(VllmEngine(chosen, job))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def ask(engine: VllmEngine, policy: Policy, **changes: Any) -> list[list[int]]:
    """Return the replies to two prompts."""
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.5, "seed": 3, "ends": [1]}
    return engine.generate(policy, PROMPTS, **{**options, **changes})


def test_rollout_process_receives_prompts_and_current_weights(
    engine: Callable[..., VllmEngine], policy: Callable[..., Policy]
) -> None:
    """The weights are written before each request."""
    ours, theirs = (
        policy(),
        engine("return [([*prompt, seed, max_new_tokens, ends[0], norm], []) for prompt in prompts]"),
    )
    theirs.load(ours, 40)
    norm = ours.model.model.norm.weight
    for seed in (3, 4):
        size = int(abs(norm.detach().numpy()).sum() * 1000)
        assert ask(theirs, ours, seed=seed) == [[*prompt, seed, 9, 1, size] for prompt in PROMPTS]
        norm.data *= 2


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("return [([1], [0.0])]", "it returned 1 replies to 2 prompts"),
        ("return [([1], [0.0]), ([], [])]", "1 of its replies do not have 1 to 9 tokens"),
        ("return [([1] * 10, []), ([1] * 11, [])]", "2 of its replies do not have 1 to 9 tokens"),
        ("raise MemoryError('no room')", "its process exited with 1"),
        ("os.kill(os.getpid(), 9)", "its process died of signal 9"),
        ("time.sleep(60)", "it has not answered within 3 s"),
    ],
)
def test_errors_have_one_sentence_and_the_log_tail(
    sample: str, message: str, engine: Callable[..., VllmEngine], policy: Callable[..., Policy]
) -> None:
    """Too few replies, empty or too long ones, a process that dies, and one that hangs."""
    theirs = engine(sample, timeout=3.0 if "sleep" in sample else 60.0)
    ours = policy()
    theirs.load(ours, 40)
    with pytest.raises(RolloutError) as caught:
        ask(theirs, ours)
    assert f"vLLM could not sample (align.rollouts): {message}" in str(caught.value)
    assert str(caught.value).endswith(
        "MemoryError: no room" if "raise" in sample else "began\nasked to load\nasked to sample"
    )
    assert "rerun to resume from here" in str(caught.value)
    theirs.close()
    assert not psutil.pid_exists(theirs.process.pid)


def test_the_stage_resumes_after_the_process_died(
    engine: Callable[..., VllmEngine], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in the second iteration of three; the next run resumes there."""
    from tasks.align import stage as align
    from tasks.common.settings import Checkpoints

    engine("return None").close()  # for the script's place
    script = tmp_path / "script.py"
    plain = "return [([prompt[-1], ends[0]], [0.0, 0.0]) for prompt in prompts]"
    monkeypatch.setitem(rollouts.MAX_LOGPROB_GAP, "float32", 1e9)  # the replies are not the policy's
    chosen = config("align@policy").model_copy(
        update={"rollouts": Vllm.model_construct(name="vllm", version="1", cache_mb=8)}
    )
    store = Checkpoints(url=str(tmp_path / "store"), every_seconds=1e9)
    job = chain.job("align@policy", chosen, tmp_path / "stage", run_folder=tmp_path / "run", checkpoints=store)
    seed = derive_seed(job.seed, Stream.ROLLOUTS, 1, 0)
    script.write_text(SCRIPT.format(sample=f"if seed == {seed}: sys.exit(5)\n    {plain}"), encoding="utf-8")
    with pytest.raises(RolloutError, match="its process exited with 5"):
        align.run(chosen, job)
    assert [path.name for path in (tmp_path / "store").glob("*/*/*")] == ["000000001"]
    script.write_text(SCRIPT.format(sample=plain), encoding="utf-8")
    metrics = align.run(chosen, job)
    assert metrics["length_first"] == metrics["length_last"] == 2
    assert job.figures["resumed_at_step"] == 1


def test_sampling_from_another_model_is_detected(
    engine: Callable[..., VllmEngine], policy: Callable[..., Policy]
) -> None:
    """By comparing vLLM's log-probabilities of the tokens with the policy's."""
    import torch

    ours = policy()
    theirs = engine("return [([3], [-1.0]), ([3, 4], [-2.0, -3.0])]")
    theirs.load(ours, 40)
    assert ask(theirs, ours) == [[3], [3, 4]]
    logp, reply_mask = torch.tensor([[-1.0, 7.0], [-2.0, -3.0]]), torch.tensor([[True, False], [True, True]])
    assert theirs.logprob_gap(logp, reply_mask) == 0
    assert theirs.logprob_gap(logp + 5e-4, reply_mask) == pytest.approx(5e-4, rel=1e-2)
    for wrong in (logp + 0.01, logp * float("nan")):
        with pytest.raises(RolloutError, match=r"nats per token off the policy's \(limit 0\.001\)"):
            theirs.logprob_gap(wrong, reply_mask)


def test_the_worker_reports_errors_and_exits_with_its_input() -> None:
    """vLLM is not importable here. The worker ignores SIGTERM and SIGINT, which the stage handles."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-I", vllm_worker.__file__, str(write_end)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[write_end], text=True)
    os.close(write_end)
    assert process.stdin is not None
    load_options = (
        '"model": "", "device": "cpu", "dtype": "float32", "threads": 1, "max_length": 9, "cache_mb": 1, "seed": 1'
    )
    with os.fdopen(read_end) as answers:
        process.stdin.write(f'["load", {{{load_options}}}]\n')
        process.stdin.flush()
        assert answers.readline() == """{"error": "ModuleNotFoundError: No module named 'vllm'"}\n"""
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(30) == 0


# Settings


@pytest.mark.parametrize(
    ("printed", "installed"), [(None, "no vLLM"), ("", "no vLLM"), ("0.31.0", "vLLM 0.31.0"), ("0.32.0", None)]
)
def test_a_missing_release_is_rejected_before_any_stage(
    printed: str | None, installed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the path and the remedy; several processes are rejected too."""
    python = tmp_path / "bin/python"
    if printed is not None:
        python.parent.mkdir()
        python.write_text(f"#!/bin/sh\necho {printed}\n")
        python.chmod(0o755)
    monkeypatch.setenv(rollouts.PYTHON_VARIABLE, str(python))
    params = read_settings(ROOT / "profiles/smoke.yaml")
    params["align"]["policy"]["rollouts"] = {"name": "vllm", "version": "0.32.0", "cache_mb": 64}
    if installed:
        with pytest.raises(SettingsError) as caught:
            params_file.check(params)
        problem = f"found '0.32.0', but {python} has {installed}: `make vllm` installs that release"
        assert f"align.policy.rollouts.version: {problem}" in str(caught.value)
    else:
        params_file.check(params)
        params["numerics"]["parallel"] = {"processes": 2, "engine": "data"}
        with pytest.raises(SettingsError, match=r"'vllm', which needs numerics\.parallel\.processes to be 1"):
            params_file.check(params)


def test_vllm_python_is_beside_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in another worktree finds it too."""
    monkeypatch.delenv(rollouts.PYTHON_VARIABLE, raising=False)
    assert rollouts.vllm_python() == Path(sys.prefix).parent / ".venv-vllm/bin/python"


# vLLM itself

INSTALLED_VERSION = rollouts.installed_version(rollouts.vllm_python())
needs_vllm = pytest.mark.skipif(
    not INSTALLED_VERSION, reason=f"no vLLM at {rollouts.vllm_python()}: `make vllm` brings it"
)
slow = [needs_vllm, pytest.mark.slow, pytest.mark.timeout(900)]
VLLM_SETTINGS = {"name": "vllm", "version": INSTALLED_VERSION, "cache_mb": 64}


@pytest.fixture(scope="module")
def vllm(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """vLLM with the tuned model."""
    folder = tmp_path_factory.mktemp("vllm")
    chosen = config("align@policy", rollouts=VLLM_SETTINGS)
    path = chain.path("data/finetune/chat/model")
    tuned = Policy.load(path, chosen.method, "shared", NUMERICS, 1.0)
    with rollouts.open_engine(
        chosen.rollouts, chain.job("align@policy", chosen, folder, run_folder=folder), tuned, 64
    ) as engine:
        assert engine is not None
        yield engine


@pytest.fixture
def prompts(chain: Chain) -> list[list[int]]:
    """Questions of different lengths, encoded as prompts."""
    tokenizer = chain.tokenizer()
    texts = (form.format(country=country) for country in CAPITALS for form in QUESTIONS)
    return [chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def vllm_replies(
    engine: VllmEngine, policy: Policy, prompts: list[list[int]], end: int, **changes: Any
) -> list[list[int]]:
    """Return vLLM's replies."""
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "seed": 1, "ends": [end]}
    return engine.generate(policy, prompts, **{**options, **changes})


@pytest.mark.parametrize("method", [{"name": "full"}, TOP, LORA])
class TestVllm:
    """Every training method; vLLM only sees the merged model."""

    pytestmark = slow

    def test_greedy_replies_match_local_generation(
        self,
        method: dict[str, Any],
        vllm: VllmEngine,
        policy: Callable[..., Policy],
        prompts: list[list[int]],
        chain: Chain,
    ) -> None:
        """Token by token, for the tuned model and for a perturbed one with other replies."""
        tokenizer, ours = chain.tokenizer(), policy(method, "separate")
        seen = []
        for _ in range(2):
            own = sampling.generate_replies(
                ours.model, tokenizer, prompts, max_new_tokens=24, temperature=0.0, seed=1, numerics=NUMERICS
            )
            assert vllm_replies(vllm, ours, prompts, tokenizer.eos_token_id) == own
            cut = vllm_replies(vllm, ours, prompts, tokenizer.eos_token_id, max_new_tokens=3)
            assert cut == [reply[:3] for reply in own]
            seen.append(own)
            perturb(ours)
        assert seen[0] != seen[1]
        assert all(reply[-1] == tokenizer.eos_token_id for reply in seen[0])

    def test_a_seed_gives_the_same_replies(
        self,
        method: dict[str, Any],
        vllm: VllmEngine,
        policy: Callable[..., Policy],
        prompts: list[list[int]],
        chain: Chain,
    ) -> None:
        """Other requests in between change nothing; another seed or another position gives other replies."""
        ours, end = policy(method), chain.tokenizer().eos_token_id
        first, other, again = (vllm_replies(vllm, ours, prompts, end, temperature=1.5, seed=seed) for seed in (7, 8, 7))
        assert first == again != other
        same = vllm_replies(vllm, ours, [prompts[0]] * 8, end, temperature=1.5)
        assert len({tuple(reply) for reply in same}) > 1


@pytest.mark.parametrize("temperature", [0.7, 1.5])
class TestShares:
    """Token frequencies."""

    pytestmark = slow

    def test_tokens_are_drawn_as_often_as_the_policy_says(
        self,
        temperature: float,
        vllm: VllmEngine,
        policy: Callable[..., Policy],
        prompts: list[list[int]],
        chain: Chain,
    ) -> None:
        """Counts are within four standard deviations of the probabilities at the given temperature."""
        import torch

        count, ours = 8000, perturb(policy())
        replies = vllm_replies(
            vllm, ours, [prompts[0]] * count, chain.tokenizer().eos_token_id, max_new_tokens=1, temperature=temperature
        )
        with torch.no_grad():
            logits = ours.model(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
        shares = torch.softmax(logits.double() / temperature, -1)
        frequencies = torch.tensor([reply[0] for reply in replies]).bincount(minlength=len(shares)) / count
        likely = shares > 0.002
        assert likely.sum() > 3
        assert ((frequencies - shares).abs()[likely] < 4 * (shares * (1 - shares) / count).sqrt()[likely]).all()
        assert frequencies[~likely].sum().item() == pytest.approx(shares[~likely].sum().item(), abs=0.02)


class TestStage:
    """Whole runs, and one that fails to start."""

    pytestmark = slow

    def test_build_for_another_device_is_rejected(
        self, chain: Chain, policy: Callable[..., Policy], tmp_path: Path
    ) -> None:
        """It would otherwise sample on the wrong device unnoticed."""
        chosen = config("align@policy", rollouts=VLLM_SETTINGS)
        numerics = NUMERICS.model_copy(update={"device": "cuda"})
        job = chain.job("align@policy", chosen, tmp_path, run_folder=tmp_path, numerics=numerics)
        with (
            pytest.raises(RolloutError, match="this build of vLLM computes on cpu, not on cuda"),
            rollouts.open_engine(chosen.rollouts, job, policy(), 64),
        ):
            pass

    def test_a_killed_run_resumes_to_the_same_bytes(self, chain: Chain, tmp_path: Path) -> None:
        """The KL is 0 at first; `kill -9` also ends vLLM, and the resumed run gives the same bytes."""
        settings = {"rollouts": VLLM_SETTINGS, "iterations": 12}
        store = tmp_path / "store"
        whole = clone(tmp_path / "whole", chain, "align policy", settings, tmp_path / "none", 1e9, dtype="float32")
        cut = clone(tmp_path / "cut", chain, "align policy", settings, store, 1e-9, dtype="float32")
        run_to_end(whole, "align policy")
        process = start_command(cut, "align policy")
        wait_for_step(4, store, process)
        children = psutil.Process(process.pid).children(recursive=True)
        commands = {child.pid: child.cmdline() for child in children}
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert any("vllm_worker" in part for child in children for part in commands[child.pid])
        psutil.wait_procs(children, timeout=30)
        assert not any(child.is_running() for child in children)
        assert "resuming at step" in run_to_end(cut, "align policy")
        assert identity.tree_hash(cut / "data/align/policy/model") == identity.tree_hash(
            whole / "data/align/policy/model"
        )
        metrics = json.loads((whole / "metrics/align@policy.json").read_text(encoding="utf-8"))
        assert metrics["kl_first"] == 0 < metrics["kl_last"]
        with (whole / "data/align/policy/history.csv").open(newline="") as file:
            gaps = [float(row["sampler_logprob_gap"]) for row in csv.DictReader(file)]
        assert len(gaps) == 13
        assert max(gaps) < 1e-4
