"""When a run is compiled, what that needs, and that it changes results by rounding only."""

from pathlib import Path
from typing import Any, Literal

import pytest

from tasks.common.harness.job import StageError
from tasks.common.overrides import masks
from tasks.common.overrides.rotary import rotate_half
from tasks.common.settings import Checkpoints, Dtypes, Numerics, Parallel
from tasks.common.training.compiling import compile_for, compile_seconds, should_compile
from tasks.pretrain import stage as pretrain
from tests.training_fixtures import ALTERNATIVES, LORA, NEW_MODEL, NUMERICS, Chain, chain, config

__all__ = ["chain"]

Choice = Literal["never", "auto", "always"]


@pytest.fixture(autouse=True)
def original_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo at the end what `compile_for` replaces in Transformers: later exports in this process would differ."""
    from transformers.models.llama import modeling_llama
    from transformers.models.modernbert import modeling_modernbert

    for module in (modeling_llama, modeling_modernbert):
        monkeypatch.setattr(module, "rotate_half", module.rotate_half)


def numerics(choice: Choice, processes: int = 1, **changes: Any) -> Numerics:
    """Return numerics with a `compile` choice and a number of processes."""
    parallel = Parallel(processes=processes, engine="data")
    return NUMERICS.model_copy(update={"compile": choice, "parallel": parallel, **changes})


@pytest.mark.parametrize(
    ("choice", "flops", "expected"),
    [
        ("never", 1e20, False),
        ("always", None, True),
        ("always", 1.0, True),
        ("auto", None, False),
        ("auto", 4.1e13, False),
        ("auto", 4.2e13, True),
    ],
)
def test_auto_compiles_long_runs(choice: Choice, flops: float | None, expected: bool) -> None:
    """Decided by the model FLOPs of a run and not by measured time."""
    assert should_compile(numerics(choice), flops, 4) is expected


@pytest.mark.parametrize(("layers", "flops"), [(4, 4.2e13), (12, 8.6e13), (30, 1.85e14)])
def test_auto_compiles_deeper_models_in_longer_runs(layers: int, flops: float) -> None:
    """A fifth of the run is saved, and each layer takes its time to compile."""
    assert compile_seconds(layers, "cpu") == pytest.approx(0.2 * flops / 1.1e11, rel=0.04)
    assert should_compile(numerics("auto"), flops, layers)
    assert not should_compile(numerics("auto"), flops, layers + 2)


def test_auto_does_not_compile_a_short_run_of_a_deep_model() -> None:
    """92 steps of eight conversations of 256 tokens through 30 layers, 135 M parameters, low-rank updates."""
    flops = 92 * 8 * 256 * 4 * 135e6
    assert not should_compile(numerics("auto"), flops, 30)
    assert should_compile(numerics("auto"), flops, 4)


def test_compiled_run_says_how_long_it_compiles(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", lambda call, **_options: call)
    short = config("pretrain@causal", steps=1, batch=4, model={**NEW_MODEL, "layers": 1})
    choices: tuple[Choice, ...] = ("never", "always")
    for choice in choices:
        chain.run(chain.job("pretrain@causal", short, tmp_path / choice, numerics=numerics(choice)), short)
        assert ("compiling in the first step, about 45 s" in capsys.readouterr().out) is (choice == "always")


@pytest.mark.parametrize("changes", [{"processes": 2}, {"threads": 2}])
def test_auto_divides_flops_by_workers(changes: dict[str, Any]) -> None:
    assert not should_compile(numerics("auto", **changes), 8.2e13, 4)
    assert should_compile(numerics("auto", **changes), 8.4e13, 4)


def test_missing_compiler_message_names_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(StageError, match=r"numerics\.compile is always, but .*\(looked for g\+\+, .*never"):
        should_compile(numerics("always"), None, 4)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(StageError, match="looked for no-such-compiler"):
        should_compile(numerics("auto"), 1e20, 4)


@pytest.mark.filterwarnings("default")  # the compiler triggers some of torch's warnings
def test_positions_and_mask_are_materialized_once() -> None:
    """Cosines, sines and mask are each materialized, and there are no graph breaks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attn_implementation="eager", **shape))
    graphs: list[list[str]] = []

    def record_graph(program: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append([str(node.target) for node in program.graph.nodes])
        return program.forward

    def logits(ids: torch.Tensor) -> Any:
        return model(input_ids=ids, use_cache=False).logits

    ids = torch.arange(24).view(2, 12)
    plain = logits(ids)
    masks.install()
    for _ in range(2):  # a second call changes nothing more
        compile_for(logits, model, static_shapes=True)  # patches the model; the result is not called
    compiled = torch.compile(logits, backend=record_graph, dynamic=False)(ids)
    assert torch.equal(compiled, plain)
    assert torch.equal(logits(ids), plain)
    assert [program.count("bessemer.once.default") for program in graphs] == [3]


def test_rotate_half_is_replaced_where_equivalent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's is replaced, with a bit-identical gradient; Cohere rotates adjacent pairs and keeps its own."""
    import torch
    from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    neighbours, theirs = modeling_cohere.rotate_half, modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", theirs)  # so that pytest restores it
    compile_for(print, LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), static_shapes=True)
    compile_for(print, CohereForCausalLM(CohereConfig(vocab_size=64, pad_token_id=0, **shape)), static_shapes=True)
    assert modeling_cohere.rotate_half is neighbours
    assert modeling_llama.rotate_half is rotate_half
    slope, graphs = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)), list[Any]()
    for rotate in (theirs, rotate_half):
        states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (rotate(states) * slope).sum().backward()
        graphs.append(states.grad)
    assert torch.equal(*graphs)


@pytest.mark.parametrize("choice", ["always", "never"])
def test_reward_models_are_never_compiled(choice: Choice, chain: Chain, tmp_path: Path) -> None:
    """Their inputs are not tensors, so each batch would recompile, up to torch's limit of eight."""
    import torch

    short = config("reward@train", steps=3, batch=4)
    job = chain.job("reward@train", short, tmp_path, numerics=numerics(choice))
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["total"]
    chain.run(job, short)
    assert torch._dynamo.utils.counters["frames"]["total"] == before


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler itself does some of what torch warns of
@pytest.mark.parametrize("name", ["pretrain@causal", "pretrain@masked"])
def test_compiled_training_matches_eager(name: str, chain: Chain, tmp_path: Path) -> None:
    """With static and dynamic shapes. Only the order of float32 sums differs."""
    short = config(name, steps=6, batch=4, model={**NEW_MODEL, "layers": 1})  # the time grows with the layers
    losses = {}
    for choice in ("never", "always"):
        job = chain.job(name, short, tmp_path / choice, numerics=numerics(choice))
        chain.run(job, short)
        rows = job.outputs["history"].read_text(encoding="utf-8").splitlines()[1:]
        losses[choice] = [float(row.split(",")[1]) for row in rows]
    assert len(losses["never"]) == 6
    assert losses["always"] == pytest.approx(losses["never"], rel=1e-4)


LORA_WITH_DROPOUT = {"method": {**LORA, "dropout": 0.2}}  # the recomputation must use the same dropout masks


@pytest.mark.parametrize(
    ("name", "dtype", "changes"),
    [
        ("pretrain@causal", "float32", {}),
        ("pretrain@causal", "bfloat16", {}),
        ("pretrain@masked", "float32", {}),
        ("finetune@chat", "float32", {}),
        ("finetune@chat", "bfloat16", LORA_WITH_DROPOUT),
        ("reward@train", "float32", {"method": {**LORA, "dropout": 0.2}}),
        ("align@policy", "float32", {"algorithm": ALTERNATIVES["dpo"], "iterations": 1}),
    ],
)
def test_activation_checkpointing_gives_the_same_bytes(
    name: str, dtype: Any, changes: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """So it is a `placement` setting: it changes memory and time only."""
    short = config(name, **({"steps": 4, "batch": 4} if name != "align@policy" else {}), **changes)
    numerics = NUMERICS.model_copy(update={"dtype": Dtypes(decoder=dtype, encoder=dtype)})
    results = []
    for switched_on in (False, True):
        folder = tmp_path / str(switched_on)
        job = chain.job(name, short, folder, numerics=numerics, activation_checkpointing=switched_on)
        chain.run(job, short)
        results.append((job.outputs["model"] / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_compiled_run_rejects_activation_checkpointing(chain: Chain, tmp_path: Path) -> None:
    """In bfloat16 it would change the result, and it is not part of a recipe."""
    short = config("pretrain@causal", steps=2, batch=4)
    job = chain.job("pretrain@causal", short, tmp_path, numerics=numerics("always"), activation_checkpointing=True)
    with pytest.raises(StageError, match=r"numerics\.compile is always, which compiles this one: set placement"):
        chain.run(job, short)


def test_a_run_that_ran_out_of_memory_resumes_with_activation_checkpointing(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes from the last checkpoint, as the message says, and gives the bytes of an uninterrupted run."""
    short = config("pretrain@causal", steps=6, batch=4)
    store = Checkpoints(url=str(tmp_path / "store"), every_seconds=1e-9)
    whole = chain.job("pretrain@causal", short, tmp_path / "whole")
    chain.run(whole, short)
    sums, calls = pretrain.CausalObjective.loss_sums, 0

    def exhausted(objective: Any, drawn: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise MemoryError("no memory")
        return sums(objective, drawn)

    monkeypatch.setattr(pretrain.CausalObjective, "loss_sums", exhausted)
    with pytest.raises(StageError, match=r"Set placement\.activation_checkpointing to true"):
        chain.run(chain.job("pretrain@causal", short, tmp_path / "ended", checkpoints=store), short)
    monkeypatch.setattr(pretrain.CausalObjective, "loss_sums", sums)
    again = chain.job("pretrain@causal", short, tmp_path / "again", checkpoints=store, activation_checkpointing=True)
    chain.run(again, short)
    assert "resuming at step 3" in capsys.readouterr().out
    assert again.figures["resumed_at_step"] == 3
    names = [job.outputs["model"] / "model.safetensors" for job in (whole, again)]
    assert names[0].read_bytes() == names[1].read_bytes()
