"""When a run is compiled, what that needs, and what it changes: the time, and no more of the numbers than rounding."""

from pathlib import Path
from typing import Any, Literal

import pytest

from tasks.common.modelling import masks
from tasks.common.settings import Numerics, Parallel
from tasks.common.stage import StageError
from tasks.common.training.compiling import PAYS, compiled, rotate_half, worthwhile
from tests.training_fixtures import NUMERICS, Chain, chain, config

__all__ = ["chain"]

Choice = Literal["never", "auto", "always"]


def numerics(choice: Choice, processes: int = 1, **changes: Any) -> Numerics:
    """Return numerics that compile or do not."""
    parallel = Parallel(processes=processes, engine="data")
    return NUMERICS.model_copy(update={"compile": choice, "parallel": parallel, **changes})


@pytest.mark.parametrize(
    ("choice", "flops", "expected"),
    [
        ("never", 1e20, False),
        ("always", None, True),
        ("always", 1.0, True),
        ("auto", None, False),
        ("auto", 0.9 * PAYS["cpu"], False),
        ("auto", 1.1 * PAYS["cpu"], True),
    ],
)
def test_what_is_long_enough_is_compiled(choice: Choice, flops: float | None, expected: bool) -> None:
    """By the model FLOPs of a run, which no clock has a part in."""
    assert worthwhile(numerics(choice), flops) is expected


@pytest.mark.parametrize("changes", [{"processes": 2}, {"threads": 2}])
def test_a_run_is_as_long_as_each_ones_share_of_it(changes: dict[str, Any]) -> None:
    assert not worthwhile(numerics("auto", **changes), 1.9 * PAYS["cpu"])
    assert worthwhile(numerics("auto", **changes), 2.1 * PAYS["cpu"])


def test_without_a_compiler_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(StageError, match=r"numerics\.compile is always, but .*\(looked for g\+\+, .*never"):
        worthwhile(numerics("always"), None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(StageError, match="looked for no-such-compiler"):
        worthwhile(numerics("auto"), 1e20)


@pytest.mark.filterwarnings("default")  # the compiler itself does some of what torch warns of
def test_positions_and_mask_are_worked_out_once_in_one_program() -> None:
    """Cosines, sines and mask are each set apart, and the model's pass is not cut into several programs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attn_implementation="eager", **shape))
    programs: list[list[str]] = []

    def seen(program: torch.fx.GraphModule, _inputs: Any) -> Any:
        programs.append([str(node.target) for node in program.graph.nodes])
        return program.forward

    def logits(ids: torch.Tensor) -> Any:
        return model(input_ids=ids, use_cache=False).logits

    ids = torch.arange(24).view(2, 12)
    plain = logits(ids)
    masks.provide()
    for _ in range(2):  # a second time changes no more
        compiled(logits, model, steady=True)  # sets the model up; what is called is compiled without machine code
    found = torch.compile(logits, backend=seen, dynamic=False)(ids)
    assert torch.equal(found, plain)
    assert torch.equal(logits(ids), plain)
    assert [program.count("bessemer.once.default") for program in programs] == [3]


def test_halves_are_rotated_by_parts_where_that_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's way, whose gradient is the same to the bit; Cohere pairs neighbours, and keeps its own."""
    import torch
    from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    neighbours, theirs = modeling_cohere.rotate_half, modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", theirs)  # so that what is changed is put back
    compiled(print, LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), steady=True)
    compiled(print, CohereForCausalLM(CohereConfig(vocab_size=64, pad_token_id=0, **shape)), steady=True)
    assert modeling_cohere.rotate_half is neighbours
    assert modeling_llama.rotate_half is rotate_half
    slope, found = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)), list[Any]()
    for rotate in (theirs, rotate_half):
        states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (rotate(states) * slope).sum().backward()
        found.append(states.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("choice", ["always", "never"])
def test_reward_models_are_not_compiled_whatever_is_said(choice: Choice, chain: Chain, tmp_path: Path) -> None:
    """Their batches are no tensors: each would be a program of its own, eight of them and then none."""
    import torch

    short = config("reward@policy", steps=3, batch=4)
    job = chain.job("reward@policy", short, tmp_path, numerics=numerics(choice))
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["total"]
    chain.run(job, short)
    assert torch._dynamo.utils.counters["frames"]["total"] == before


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler itself does some of what torch warns of
@pytest.mark.parametrize("name", ["pretrain@clm", "pretrain@mlm"])
def test_compiled_it_learns_the_same(name: str, chain: Chain, tmp_path: Path) -> None:
    """Batches of one shape and of many. What differs is the order of float32 sums."""
    short = config(name, steps=6, batch=4)
    losses = {}
    for choice in ("never", "always"):
        job = chain.job(name, short, tmp_path / choice, numerics=numerics(choice))
        chain.run(job, short)
        rows = job.outputs["history"].read_text(encoding="utf-8").splitlines()[1:]
        losses[choice] = [float(row.split(",")[1]) for row in rows]
    assert len(losses["never"]) == 6
    assert losses["always"] == pytest.approx(losses["never"], rel=1e-4)


@pytest.mark.parametrize("name", ["pretrain@clm", "pretrain@mlm", "finetune", "reward@policy"])
def test_blocks_that_are_worked_out_again_give_the_same_bytes(name: str, chain: Chain, tmp_path: Path) -> None:
    """Activation checkpointing changes nothing but memory and time."""
    short = config(name, steps=4, batch=4)
    found = []
    for recompute in (False, True):
        again = NUMERICS.model_copy(update={"recompute": recompute})
        job = chain.job(name, short, tmp_path / str(recompute), numerics=again)
        chain.run(job, short)
        found.append((job.outputs["model"] / "model.safetensors").read_bytes())
    assert found[0] == found[1]
