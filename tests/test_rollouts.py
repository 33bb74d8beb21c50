"""Sampling through vLLM: what is asked of it and what it may get wrong, and, where it is installed, what it says.

The tests of vLLM itself take some minutes and need the environment that `make vllm` makes; the others put a script in
the place of its process.
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

from tasks.common import identity, settings
from tasks.common.alignment import rollouts, vllm_worker
from tasks.common.alignment.policy import Policy
from tasks.common.alignment.rollouts import Engine, RolloutError, Vllm
from tasks.common.evaluation import sampling
from tasks.common.modelling import models
from tasks.common.settings import SettingsError
from tasks.common.text import chat
from tests.conftest import ROOT
from tests.test_resume import clone, finished, start, wait_for_step
from tests.training_fixtures import CAPITALS, LORA, NUMERICS, QUESTIONS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

PROMPTS = [[5, 6, 7], [8, 9]]
TOP = {"name": "top", "layers": 1}
# A process in vLLM's place: it says something in its log and does what the test names.
SCRIPT = """
import json, os, sys, time
from safetensors import safe_open

def sample(weights, prompts, seed, max_new_tokens, temperature, end):
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
    """Return a maker of policies on the tuned model."""

    def make(method: dict[str, Any] | None = None, values: Any = "shared") -> Policy:
        chosen = config("ppo", method=method or {"name": "full"}).method
        return Policy.load(chain.path("data/finetune/model"), chosen, values, NUMERICS, 1.0)

    return make


def moved(policy: Policy) -> Policy:
    """Return the policy, all that it trains moved a little."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.mark.parametrize("method", [{"name": "full"}, TOP, LORA])
@pytest.mark.parametrize("values", ["shared", "separate"])
def test_what_is_handed_over_is_what_would_be_saved(
    method: dict[str, Any], values: str, policy: Callable[..., Policy], chain: Chain
) -> None:
    """Under the names of the plain model, without head or critic, tied weights twice; the policy stays in training."""
    import torch

    ours, path = moved(policy(method, values)), chain.path("data/finetune/model")
    trained = {name: value.clone() for name, value in ours.model.named_parameters() if value.requires_grad}
    found = ours.plain_weights(path)
    after = {name: value for name, value in ours.model.named_parameters() if value.requires_grad}
    assert all((after[name] == value).all() for name, value in trained.items())
    assert after.keys() == trained.keys()
    plain = ours.plain(path, ours.model).state_dict()
    assert found.keys() == plain.keys() == models.load_decoder(path, NUMERICS).state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


# A process that stands in for vLLM


@pytest.fixture
def engine(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Return a maker of engines whose process runs a script that samples by some lines of code."""
    opened: list[Engine] = []

    def make(sample: str, timeout: float = 60.0) -> Engine:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(sample=sample), encoding="utf-8")
        monkeypatch.setattr(vllm_worker, "__file__", str(script))
        monkeypatch.setattr(rollouts, "python", lambda: Path(sys.executable))
        job = chain.job("ppo", config("ppo"), tmp_path / "outputs", run_folder=tmp_path / "run")
        chosen = Vllm.model_construct(name="vllm", version="1", cache_mb=8, timeout=timeout)
        opened.append(Engine(chosen, job))
        return opened[-1]

    yield make
    for found in opened:
        found.close()


def ask(engine: Engine, policy: Policy, **changes: Any) -> list[list[int]]:
    """Return the replies to two prompts."""
    given: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.5, "seed": 3, "end": 1}
    return engine.replies(policy, PROMPTS, **{**given, **changes})


def test_the_process_is_handed_prompts_and_the_weights_as_they_stand(
    engine: Callable[..., Engine], policy: Callable[..., Policy]
) -> None:
    """Before each iteration those that the policy has then."""
    ours, theirs = policy(), engine("return [([*prompt, seed, max_new_tokens, end, norm], []) for prompt in prompts]")
    theirs.load(ours, 40)
    norm = ours.model.model.norm.weight
    for seed in (3, 4):
        size = int(abs(norm.detach().numpy()).sum() * 1000)
        assert ask(theirs, ours, seed=seed) == [[*prompt, seed, 9, 1, size] for prompt in PROMPTS]
        norm.data *= 2


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ("return [([1], [0.0])]", "it gave 1 replies to 2 prompts"),
        ("return [([1], [0.0]), ([], [])]", "1 of its replies are not of 1 to 9 tokens"),
        ("return [([1] * 10, []), ([1] * 11, [])]", "2 of its replies are not of 1 to 9 tokens"),
        ("raise MemoryError('no room')", "its process ended with 1"),
        ("os.kill(os.getpid(), 9)", "its process ended by signal 9"),
        ("time.sleep(60)", "it has not answered within 3 s"),
    ],
)
def test_what_goes_wrong_is_one_sentence_with_the_end_of_the_log(
    sample: str, told: str, engine: Callable[..., Engine], policy: Callable[..., Policy]
) -> None:
    """Too few replies, empty or endless ones, a process that dies, and one that hangs."""
    theirs = engine(sample, timeout=3.0 if "sleep" in sample else 60.0)
    ours = policy()
    theirs.load(ours, 40)
    with pytest.raises(RolloutError) as caught:
        ask(theirs, ours)
    assert f"vLLM could not sample (ppo.rollouts): {told}" in str(caught.value)
    assert str(caught.value).endswith(
        "MemoryError: no room" if "raise" in sample else "began\nasked to load\nasked to sample"
    )
    assert "the stage goes on from here" in str(caught.value)
    theirs.close()
    assert not psutil.pid_exists(theirs.process.pid)


def test_the_stage_keeps_what_it_learnt_where_the_process_dies_and_goes_on_from_there(
    engine: Callable[..., Engine], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in the second iteration of three; the next run begins there."""
    from tasks import ppo
    from tasks.common.settings import Checkpoints

    engine("return None").close()  # for the script's place
    script, seed = tmp_path / "script.py", 1
    plain = "return [([prompt[-1], end], [0.0, 0.0]) for prompt in prompts]"
    monkeypatch.setitem(rollouts.APART, "float32", 1e9)  # for these are no replies of the policy's
    chosen = config("ppo").model_copy(
        update={"rollouts": Vllm.model_construct(name="vllm", version="1", cache_mb=8, timeout=60.0)}
    )
    store = Checkpoints(url=str(tmp_path / "store"), every_seconds=1e9)
    job = chain.job("ppo", chosen, tmp_path / "stage", run_folder=tmp_path / "run", checkpoints=store)
    script.write_text(SCRIPT.format(sample=f"if seed == {seed + 1}: sys.exit(5)\n    {plain}"), encoding="utf-8")
    with pytest.raises(RolloutError, match="its process ended with 5"):
        ppo.run(chosen, job)
    assert [path.name for path in (tmp_path / "store").glob("*/*/*")] == ["000000001"]
    script.write_text(SCRIPT.format(sample=plain), encoding="utf-8")
    metrics = ppo.run(chosen, job)
    assert metrics["length_first"] == metrics["length_last"] == 2
    assert job.figures["resumed_at_step"] == 1


def test_what_samples_from_another_model_is_found_out(
    engine: Callable[..., Engine], policy: Callable[..., Policy]
) -> None:
    """By the log-probabilities that it says its tokens have, each reply's beside the policy's own."""
    import torch

    ours = policy()
    theirs = engine("return [([3], [-1.0]), ([3, 4], [-2.0, -3.0])]")
    theirs.load(ours, 40)
    assert ask(theirs, ours) == [[3], [3, 4]]
    logp, replied = torch.tensor([[-1.0, 7.0], [-2.0, -3.0]]), torch.tensor([[True, False], [True, True]])
    assert theirs.apart(logp, replied) == 0
    assert theirs.apart(logp + 5e-4, replied) == pytest.approx(5e-4, rel=1e-2)
    for wrong in (logp + 0.01, logp * float("nan")):
        with pytest.raises(RolloutError, match=r"nats a token off the policy's \(rounding makes 0\.001\)"):
            theirs.apart(wrong, replied)


def test_the_worker_says_what_it_cannot_do_and_ends_with_its_input() -> None:
    """Here it has no vLLM to load a model with. A stop that is told to the whole group is the stage's affair."""
    reading, writing = os.pipe()
    command = [sys.executable, "-I", vllm_worker.__file__, str(writing)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[writing], text=True)
    os.close(writing)
    assert process.stdin is not None
    given = '"model": "", "device": "cpu", "dtype": "float32", "threads": 1, "longest": 9, "cache_mb": 1, "seed": 1'
    with os.fdopen(reading) as answers:
        process.stdin.write(f'["load", {{{given}}}]\n')
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
    ("said", "told"), [(None, "there is none"), ("", "there is none"), ("0.31.0", "there is 0.31.0"), ("0.32.0", None)]
)
def test_another_release_or_none_is_told_before_anything_runs(
    said: str | None, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With where it was looked for and what brings it; so is a second process, which has nothing to hand over."""
    there = tmp_path / "bin/python"
    if said is not None:
        there.parent.mkdir()
        there.write_text(f"#!/bin/sh\necho {said}\n")
        there.chmod(0o755)
    monkeypatch.setenv(rollouts.PYTHON, str(there))
    params = settings.read_params(ROOT / "profiles/smoke.yaml")
    params["ppo"]["rollouts"] = {"name": "vllm", "version": "0.32.0", "cache_mb": 64, "timeout": 60}
    if told:
        with pytest.raises(SettingsError) as caught:
            settings.check(params)
        assert f"ppo.rollouts.version: found '0.32.0', but {there} should have that release" in str(caught.value)
        assert f"{told}: `make vllm` brings it" in str(caught.value)
    else:
        settings.check(params)
        params["numerics"]["parallel"] = {"processes": 2, "engine": "data"}
        with pytest.raises(SettingsError, match=r"'vllm', which needs numerics\.parallel\.processes to be 1"):
            settings.check(params)


def test_it_is_looked_for_beside_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run in a worktree of its own finds it too."""
    monkeypatch.delenv(rollouts.PYTHON, raising=False)
    assert rollouts.python() == Path(sys.prefix).parent / ".venv-vllm/bin/python"


# vLLM itself

THERE = rollouts.installed(rollouts.python())
needs_vllm = pytest.mark.skipif(not THERE, reason=f"no vLLM at {rollouts.python()}: `make vllm` brings it")
slow = [needs_vllm, pytest.mark.slow, pytest.mark.timeout(900)]
CHOSEN = {"name": "vllm", "version": THERE, "cache_mb": 64, "timeout": 300}


@pytest.fixture(scope="module")
def vllm(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM with the tuned model."""
    folder = tmp_path_factory.mktemp("vllm")
    chosen = config("ppo", rollouts=CHOSEN)
    path = chain.path("data/finetune/model")
    tuned = Policy.load(path, chosen.method, "shared", NUMERICS, 1.0)
    with rollouts.opened(chosen.rollouts, chain.job("ppo", chosen, folder, run_folder=folder), tuned, 64) as found:
        assert found is not None
        yield found


@pytest.fixture
def prompts(chain: Chain) -> list[list[int]]:
    """Questions of different lengths, as the policy is asked them."""
    tokenizer = chain.tokenizer()
    texts = (form.format(country=country) for country in CAPITALS for form in QUESTIONS)
    return [chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def said(engine: Engine, policy: Policy, prompts: list[list[int]], end: int, **changes: Any) -> list[list[int]]:
    """Return vLLM's replies."""
    given: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0, "seed": 1, "end": end}
    return engine.replies(policy, prompts, **{**given, **changes})


@pytest.mark.parametrize("method", [{"name": "full"}, TOP, LORA])
class TestVllm:
    """With each method of training, of which vLLM sees but the plain model."""

    pytestmark = slow

    def test_greedy_replies_are_our_own(
        self,
        method: dict[str, Any],
        vllm: Engine,
        policy: Callable[..., Policy],
        prompts: list[list[int]],
        chain: Chain,
    ) -> None:
        """Token by token, of the tuned model and of one that has moved from it, whose replies are others."""
        tokenizer, ours = chain.tokenizer(), policy(method, "separate")
        seen = []
        for _ in range(2):
            own = sampling.replies(
                ours.model, tokenizer, prompts, max_new_tokens=24, temperature=0.0, seed=1, numerics=NUMERICS
            )
            assert said(vllm, ours, prompts, tokenizer.eos_token_id) == own
            cut = said(vllm, ours, prompts, tokenizer.eos_token_id, max_new_tokens=3)
            assert cut == [reply[:3] for reply in own]
            seen.append(own)
            moved(ours)
        assert seen[0] != seen[1]
        assert all(reply[-1] == tokenizer.eos_token_id for reply in seen[0])

    def test_a_seed_gives_the_same_replies(
        self,
        method: dict[str, Any],
        vllm: Engine,
        policy: Callable[..., Policy],
        prompts: list[list[int]],
        chain: Chain,
    ) -> None:
        """Also after others were asked for; another seed gives other ones, and so does another place."""
        ours, end = policy(method), chain.tokenizer().eos_token_id
        first, other, again = (said(vllm, ours, prompts, end, temperature=1.5, seed=seed) for seed in (7, 8, 7))
        assert first == again != other
        same = said(vllm, ours, [prompts[0]] * 8, end, temperature=1.5)
        assert len({tuple(reply) for reply in same}) > 1


@pytest.mark.parametrize("temperature", [0.7, 1.5])
class TestShares:
    """What is drawn."""

    pytestmark = slow

    def test_tokens_are_drawn_as_often_as_the_policy_says(
        self, temperature: float, vllm: Engine, policy: Callable[..., Policy], prompts: list[list[int]], chain: Chain
    ) -> None:
        """Within four standard deviations of each token's count, at the temperature that is asked for."""
        import torch

        count, ours = 8000, moved(policy())
        found = said(
            vllm, ours, [prompts[0]] * count, chain.tokenizer().eos_token_id, max_new_tokens=1, temperature=temperature
        )
        with torch.no_grad():
            logits = ours.model(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
        shares = torch.softmax(logits.double() / temperature, -1)
        drawn = torch.tensor([reply[0] for reply in found]).bincount(minlength=len(shares)) / count
        likely = shares > 0.002
        assert likely.sum() > 3
        assert ((drawn - shares).abs()[likely] < 4 * (shares * (1 - shares) / count).sqrt()[likely]).all()
        assert drawn[~likely].sum().item() == pytest.approx(shares[~likely].sum().item(), abs=0.02)


class TestStage:
    """Whole runs, and one that does not begin."""

    pytestmark = slow

    def test_a_build_for_another_device_is_refused(
        self, chain: Chain, policy: Callable[..., Policy], tmp_path: Path
    ) -> None:
        """It would sample all the same, where nobody looks for it."""
        chosen = config("ppo", rollouts=CHOSEN)
        numerics = NUMERICS.model_copy(update={"device": "cuda"})
        job = chain.job("ppo", chosen, tmp_path, run_folder=tmp_path, numerics=numerics)
        with (
            pytest.raises(RolloutError, match="this build of vLLM computes on cpu, not on cuda"),
            rollouts.opened(chosen.rollouts, job, policy(), 64),
        ):
            pass

    def test_it_learns_and_killed_it_goes_on_as_if_nothing_had_been(self, chain: Chain, tmp_path: Path) -> None:
        """The KL is 0 at first; `kill -9` takes vLLM with it, and the resumed run ends with the same bytes."""
        settings = {"rollouts": CHOSEN, "iterations": 12}
        store = tmp_path / "store"
        whole = clone(tmp_path / "whole", chain, "ppo", settings, tmp_path / "none", 1e9, dtype="float32")
        cut = clone(tmp_path / "cut", chain, "ppo", settings, store, 1e-9, dtype="float32")
        finished(whole, "ppo")
        process = start(cut, "ppo")
        wait_for_step(4, store, process)
        children = psutil.Process(process.pid).children(recursive=True)
        commands = {child.pid: child.cmdline() for child in children}
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert any("vllm_worker" in part for child in children for part in commands[child.pid])
        psutil.wait_procs(children, timeout=30)
        assert not any(child.is_running() for child in children)
        assert "resuming at step" in finished(cut, "ppo")
        assert identity.tree_hash(cut / "data/ppo/model") == identity.tree_hash(whole / "data/ppo/model")
        metrics = json.loads((whole / "metrics/ppo.json").read_text(encoding="utf-8"))
        assert metrics["kl_first"] == 0 < metrics["kl_last"]
        with (whole / "data/ppo/history.csv").open(newline="") as file:
            apart = [float(row["sampler_apart"]) for row in csv.DictReader(file)]
        assert len(apart) == 13
        assert max(apart) < 1e-4
