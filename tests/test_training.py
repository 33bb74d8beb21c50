"""The training loop: losses, gradient accumulation, errors, checkpoints, and resuming to the same bytes."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest
from pydantic import ValidationError

from tasks.common import identity
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import models, torch_setup
from tasks.common.modelling.models import Shape
from tasks.common.settings import Checkpoints, Dtypes
from tasks.common.training.checkpoints import CheckpointStore
from tasks.common.training.loop import History, MicroBatch, Shard, Training, batch_at, train
from tasks.common.training.parallel import World
from tests.training_fixtures import (
    BASE_OPTIMIZER,
    CONSTANT,
    LORA,
    NUMERICS,
    OPTIMIZER_OPTIONS,
    SHAPE,
    Chain,
    chain,
    config,
)

if TYPE_CHECKING:
    import torch

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

STEPS = 12
SINGLE_PROCESS = World(0, 1, "data", "cpu")


def settings(name: str = "adamw", steps: int = STEPS, accumulate: int = 1, **changes: Any) -> Training:
    """Return training settings, with some of the optimizer's changed."""
    optimizer = {"name": name, **BASE_OPTIMIZER, **OPTIMIZER_OPTIONS[name], **changes}
    return Training.model_validate({"steps": steps, "gradient_accumulation_steps": accumulate, "optimizer": optimizer})


def make_job(url: str, recipe: str = "r", every: float = 1e9) -> Job:
    """Return a job with only a checkpoint store."""
    return Job("toy", None, {}, {}, 1, NUMERICS, recipe, Checkpoints(url=url, every_seconds=every))


class Toy:
    """A small regression objective whose batch is a pure function of the step."""

    weights: ClassVar = {"error": 0.5, "size": 0.25}
    static_shapes = None  # its model has no config, and a step is no tensor

    def __init__(self, seed: int = 0) -> None:
        import torch

        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)
        )
        self.seen: list[int] = []
        self.stop_at: int | None = None
        self.scaled_loss: tuple[int, str, float] | None = None

    def draw(self, step: int, shard: Shard) -> MicroBatch:
        """Return a shard of a step's batch."""
        import torch

        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))[shard.index :: shard.count]
        names = [f"row {number}" for number in range(16)[shard.rows]]
        return MicroBatch((step, x), {"error": len(x), "size": 4 * len(x)}, x.numel(), names)

    def loss_sums(self, micro_batch: MicroBatch) -> dict[str, "torch.Tensor"]:
        """Return the summed squared error, and that of a second target."""
        step, x = micro_batch.inputs
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(step)
        output = self.model(x)[:, 0]
        sums = {"error": (output - x.sum(1)).square().sum(), "size": (output[:, None] - x).square().sum()}
        if self.scaled_loss and self.scaled_loss[0] == step:
            sums[self.scaled_loss[1]] = sums[self.scaled_loss[1]] * self.scaled_loss[2]
        return sums

    def values(self) -> list[list[float]]:
        """Return all weights."""
        return [parameter.flatten().tolist() for parameter in self.model.parameters()]


# Curves


def test_curves_average_over_a_few_steps(tmp_path: Path) -> None:
    """Each row has the means of the steps since the last row, and the file has the same rows."""
    history = History(every_steps=2)
    for step, loss in enumerate([1.0, 3.0, 5.0, 6.0, 10.0]):
        history.add(step, {"loss": loss})
    history.flush(4)
    assert history.rows == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 5.5}, {"step": 5, "loss": 10.0}]
    history.write(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == history.rows


# The loop


def test_train_reports_losses_and_speed(tmp_path: Path) -> None:
    """Every step runs once and in order, the loss falls, and loss terms and speed are reported."""
    toy, job = Toy(), make_job(str(tmp_path))
    _, history = train(toy.model, toy, settings(steps=60, learning_rate=0.05), job)
    assert toy.seen == list(range(60))
    assert history.rows[-1]["error_loss"] < 0.3 * history.rows[0]["error_loss"]
    weighed = [0.5 * row["error_loss"] + 0.25 * row["size_loss"] for row in history.rows]
    assert [row["loss"] for row in history.rows] == pytest.approx(weighed, abs=2e-6)
    assert job.figures["tokens_per_second"] > 0
    assert job.figures["resumed_at_step"] == 0


@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_gradient_accumulation_equals_whole_batch(accumulate: int, tmp_path: Path) -> None:
    """Also with micro-batches of unequal size; equal up to float32 rounding."""
    import torch

    whole, parts = Toy(), Toy()
    for toy in (whole, parts):
        cast(torch.nn.Dropout, toy.model[2]).p = 0.0  # dropout differs between micro-batches
    _, expected = train(whole.model, whole, settings(name="sgd"), make_job(str(tmp_path), "whole"))
    _, history = train(
        parts.model, parts, settings(name="sgd", accumulate=accumulate), make_job(str(tmp_path), "parts")
    )
    assert parts.seen == [step for step in range(STEPS) for _ in range(accumulate)]
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in history.rows] == pytest.approx([row["loss"] for row in expected.rows], rel=1e-5)


def test_gradient_accumulation_skips_empty_micro_batches(tmp_path: Path) -> None:
    """Micro-batches without rows are skipped."""
    toy = Toy()
    train(toy.model, toy, settings(steps=1, accumulate=40), make_job(str(tmp_path)))
    assert toy.seen == [0] * 16


def test_gradients_are_clipped_to_max_norm(tmp_path: Path) -> None:
    """One SGD step at learning rate 1 moves the weights by exactly `max_grad_norm` if the gradient is longer."""
    import torch

    toy = Toy()
    before = torch.cat([parameter.detach().flatten().clone() for parameter in toy.model.parameters()])
    config = settings(name="sgd", steps=1, learning_rate=1.0, weight_decay=0.0, max_grad_norm=0.125, schedule=CONSTANT)
    _, history = train(toy.model, toy, config, make_job(str(tmp_path)))
    after = torch.cat([parameter.detach().flatten() for parameter in toy.model.parameters()])
    assert history.rows[0]["gradient_norm"] > 0.125
    assert (after - before).norm().item() == pytest.approx(0.125, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("term", ["error", "size"])
def test_non_finite_loss_stops_training_with_message(value: float, term: str, tmp_path: Path) -> None:
    """The message has step, batch and learning rate; the weights of the last good step are saved in the store."""
    toy, reference = Toy(), Toy()
    config = settings(steps=10, schedule=CONSTANT)
    train(reference.model, reference, config.model_copy(update={"steps": 3}), make_job(str(tmp_path), "reference"))
    toy.scaled_loss = (3, term, value)
    with pytest.raises(
        StageError, match=r"step 4 of 10 .*row 0, row 1, .* and 4 more.*saved in .*rate.* 0\.003"
    ) as failure:
        train(toy.model, toy, config, make_job(str(tmp_path)))
    assert "loss" in str(failure.value)
    assert toy.values() == reference.values()
    store = CheckpointStore.for_job(make_job(str(tmp_path)), SINGLE_PROCESS)
    assert [Path(path).name for path in store.filesystem.ls(store.folder, detail=False)] == ["000000003"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["a bit", "half"])
def test_damaged_checkpoint_is_rejected(name: str, harm: str, tmp_path: Path) -> None:
    """A flipped bit would silently change the final weights."""
    toy, config, job = Toy(), settings(steps=6), make_job(str(tmp_path), every=1e-9)
    toy.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        train(toy.model, toy, config, job)
    (file,) = Path(tmp_path).rglob(name)
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content if harm == "a bit" else content[: len(content) // 2])
    again = Toy()
    with pytest.raises(
        StageError, match=r"the checkpoint .*/000000004 is damaged.* Remove that folder to start from step 0"
    ):
        train(again.model, again, config, job)


def test_two_runs_may_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two clones at once, one may delete a checkpoint that the other is about to delete; both finish correctly."""
    toys = [Toy(), Toy()]
    train(toys[0].model, toys[0], settings(), make_job(str(tmp_path), "alone"))
    original = CheckpointStore._folders
    monkeypatch.setattr(CheckpointStore, "_folders", lambda store: [*original(store), "000000000"])
    monkeypatch.setattr(CheckpointStore, "_complete", lambda store, folder: folder != "000000000")
    train(toys[1].model, toys[1], settings(), make_job(str(tmp_path), "shared", every=1e-9))
    assert toys[0].values() == toys[1].values()


def test_checkpoint_deleted_by_another_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it is deleted while it is written, training continues and writes the next one."""
    toy, write, calls = Toy(), CheckpointStore._write, iter(range(99))

    def save_checkpoint(store: CheckpointStore, step: int, *contents: bytes) -> None:
        if next(calls) == 0:
            raise FileNotFoundError("gone")
        write(store, step, *contents)

    monkeypatch.setattr(CheckpointStore, "_write", save_checkpoint)
    toy.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        train(toy.model, toy, settings(), make_job(str(tmp_path), every=1e-9))
    assert "the checkpoint of step 1 was not saved, because another run uses" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*/*/*")] == ["000000003"]


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.")]
)
def test_out_of_memory_message_names_setting(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the setting's name, its value and the value to set."""
    toy = Toy()

    def loss_sums(micro_batch: MicroBatch) -> Any:
        raise error

    monkeypatch.setattr(toy, "loss_sums", loss_sums)
    with pytest.raises(StageError) as failure:
        train(toy.model, toy, settings(accumulate=2), make_job(str(tmp_path)))
    message = str(failure.value)
    assert message.startswith(
        f"memory ran out in a training step ({error}). Set placement.activation_checkpointing to true"
    )
    assert "set toy.gradient_accumulation_steps to 4 (now 2)" in message


@pytest.mark.parametrize(
    "message", ["mat1 and mat2 shapes cannot be multiplied", "CUDA error: an illegal memory access was encountered"]
)
def test_other_errors_are_not_reported_as_out_of_memory(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shape mismatches and kernel faults keep their own message."""
    toy = Toy()

    def loss_sums(micro_batch: MicroBatch) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(toy, "loss_sums", loss_sums)
    with pytest.raises(RuntimeError, match=message):
        train(toy.model, toy, settings(), make_job(str(tmp_path)))


# Checkpoints


@pytest.fixture(params=["file", "memory"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a checkpoint store that no other test uses."""
    return {"file": f"file://{tmp_path}/store", "memory": f"memory://{tmp_path.name}/store"}[request.param]


@pytest.mark.parametrize("name", sorted(OPTIMIZER_OPTIONS))
@pytest.mark.parametrize("stop", [1, 5, STEPS - 1])
def test_resumed_run_equals_uninterrupted_run(name: str, stop: int, store_url: str) -> None:
    """Killed at any step and resumed with other initial weights, a run gives the same bits and the same curves."""
    whole, first, second = Toy(seed=0), Toy(seed=0), Toy(seed=9)
    _, expected = train(whole.model, whole, settings(name=name), make_job(store_url, "whole"))
    first.stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        train(first.model, first, settings(name=name), make_job(store_url, every=1e-9))
    again = make_job(store_url)
    _, history = train(second.model, second, settings(name=name), again)
    assert second.seen == list(range(stop, STEPS))
    assert again.figures["resumed_at_step"] == stop
    assert second.values() == whole.values()
    assert history.rows == expected.rows


def test_another_recipe_is_never_resumed(store_url: str) -> None:
    """Checkpoints of other recipes in the same store are neither read nor deleted."""
    first, second = Toy(), Toy()
    train(first.model, first, settings(), make_job(store_url, "one", every=1e-9))
    train(second.model, second, settings(), make_job(store_url, "another"))
    assert second.seen == list(range(STEPS))


def test_one_checkpoint_is_kept_until_the_stage_is_complete(store_url: str) -> None:
    """Each checkpoint replaces the one before it, and the harness's last call deletes it."""
    toy, job = Toy(), make_job(store_url, every=1e-9)
    train(toy.model, toy, settings(), job)
    store = CheckpointStore.for_job(job, SINGLE_PROCESS)
    assert [Path(path).name for path in store.filesystem.ls(store.folder, detail=False)] == [f"{STEPS:09d}"]
    for call in job.when_complete:
        call()
    assert not store.filesystem.exists(store.folder)


def test_checkpoints_respect_interval(store_url: str) -> None:
    """A run that is shorter than the checkpoint interval writes no checkpoint."""
    toy, job = Toy(), make_job(store_url, every=3600)
    train(toy.model, toy, settings(), job)
    store = CheckpointStore.for_job(job, SINGLE_PROCESS)
    assert store.filesystem.ls(store.folder) == []


def test_unwritable_store_is_reported_before_first_step(tmp_path: Path) -> None:
    """The message has the URL and the setting, instead of a traceback at the first checkpoint."""
    (tmp_path / "file").write_text("no folder")
    toy = Toy()
    with pytest.raises(StageError, match=r"/file, the store of .* cannot be .*placement\.checkpoints\.url"):
        train(toy.model, toy, settings(), make_job(str(tmp_path / "file")))
    assert toy.seen == []


def test_clear_failure_does_not_fail_complete_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The outputs are already in place; failing would repeat the run for nothing."""
    store = CheckpointStore.for_job(make_job(str(tmp_path / "store")), SINGLE_PROCESS)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(store.filesystem, "rm", refuse)
    store.clear()
    assert "could not be deleted (read-only)" in capsys.readouterr().out


def test_checkpoint_of_another_model_is_rejected(store_url: str) -> None:
    """The message has the first tensor that does not match, and what to do."""
    import torch

    toy, wider = Toy(), Toy()
    train(toy.model, toy, settings(), make_job(store_url, every=1e-9))
    wider.model[0], wider.model[3] = torch.nn.Linear(4, 9), torch.nn.Linear(9, 1)
    with pytest.raises(
        StageError, match=r"0+12 does not match these settings: 0\.bias is \(8,\) in the .* and \(9,\) in the"
    ):
        train(wider.model, wider, settings(), make_job(store_url))
    wider.model.requires_grad_(False)[0].requires_grad_(True)
    wider.model[0] = torch.nn.Linear(4, 8)
    with pytest.raises(StageError, match=r"3\.bias is \(1,\) in the checkpoint and not trained in"):
        train(wider.model, wider, settings(), make_job(store_url))


@pytest.mark.parametrize("lost", ["state.safetensors", "state.json"])
def test_incomplete_checkpoint_is_ignored(lost: str, store_url: str) -> None:
    """An interrupted move leaves a partial checkpoint, which is not read and is replaced by the next one."""
    toy, job = Toy(), make_job(store_url, every=1e-9)
    toy.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        train(toy.model, toy, settings(), job)
    store = CheckpointStore.for_job(job, SINGLE_PROCESS)
    store.filesystem.rm(f"{store.folder}/000000006/{lost}")
    again, whole = Toy(), Toy()
    train(again.model, again, settings(), make_job(store_url, every=1e-9))
    train(whole.model, whole, settings(), make_job(store_url, "whole"))
    assert again.seen == list(range(STEPS))
    assert again.values() == whole.values()
    assert [Path(path).name for path in store.filesystem.ls(store.folder, detail=False)] == [f"{STEPS:09d}"]


# Whole stages

DORA = {**LORA, "dora": True, "dropout": 0.1}
STAGE_CASES = [
    ("pretrain@causal", {"steps": 5, "batch": 4}),
    ("pretrain@masked", {"steps": 5, "batch": 4}),
    ("finetune@chat", {"steps": 5, "batch": 4}),
    ("finetune@chat", {"steps": 5, "batch": 4, "method": DORA}),
    ("finetune@chat", {"steps": 5, "batch": 4, "method": {"name": "adapter", "width": 5}}),
    ("finetune@chat", {"steps": 5, "batch": 4, "task": {"name": "chat", "answers": "all", "packing": 48}}),
    ("reward@train", {"steps": 5, "batch": 2}),
    ("prune@pruned", {"steps": 5}),
]


@pytest.mark.parametrize(("name", "changes"), STAGE_CASES)
def test_killed_stage_resumes_to_same_result(
    name: str, changes: dict[str, Any], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whole stages: model, curves and metrics of a resumed run equal those of an uninterrupted one."""
    tiny = config(name, **changes)
    numerics = NUMERICS.model_copy(update={"dtype": Dtypes(decoder="bfloat16", encoder="float32")})
    every = Checkpoints(url=f"{tmp_path}/store", every_seconds=1e-9)
    job = chain.job(name, tiny, tmp_path / "whole", numerics=numerics)
    expected = chain.run(job, tiny), hashes(job)
    save = CheckpointStore.save

    def killed(self: CheckpointStore, step: int, *parts: Any) -> None:
        save(self, step, *parts)
        if step == 3:
            raise KeyboardInterrupt

    again = chain.job(name, tiny, tmp_path / "again", numerics=numerics, checkpoints=every)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            chain.run(again, tiny)
    assert (chain.run(again, tiny), hashes(again)) == expected
    assert again.figures["resumed_at_step"] == 3


def hashes(job: Job) -> dict[str, str]:
    """Return the hash of each of a job's outputs."""
    return {name: identity.tree_hash(path) for name, path in job.outputs.items()}


@pytest.mark.parametrize(
    ("name", "changes"), [*STAGE_CASES, ("align@policy", {"iterations": 2, "episodes": 4, "minibatch": 2})]
)
def test_a_seed_gives_the_same_bytes_every_time(
    name: str, changes: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """Runs with one seed agree bit for bit, whatever the state of the global generator; another seed differs."""
    import torch

    tiny, results = config(name, **changes), []
    for number, seed in enumerate((1, 1, 2)):
        torch.rand(number)
        job = chain.job(name, tiny, tmp_path / str(number), seed=seed)
        chain.run(job, tiny)
        results.append(hashes(job))
    assert results[0] == results[1]
    assert results[0]["model"] != results[2]["model"]


# Models


@pytest.mark.parametrize("build", [models.new_decoder, models.new_encoder])
def test_saved_model_round_trips(build: Callable[..., Any], chain: Chain, tmp_path: Path) -> None:
    """A saved model loads with the same weights and logits, and tied weights count once."""
    import torch

    tokenizer = chain.tokenizer()
    model = build(Shape(**SHAPE), tokenizer, 64, NUMERICS).eval()
    models.save(model, tokenizer, tmp_path / "model")
    load = models.load_decoder if build is models.new_decoder else models.load_encoder
    loaded = load(tmp_path / "model", NUMERICS).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    stored = sum(math.prod(shape) for shape in stored_shapes(tmp_path / "model/model.safetensors"))
    assert models.parameter_count(loaded) == models.parameter_count(model) == stored


def stored_shapes(path: Path) -> list[list[int]]:
    """Return the shapes of the tensors in a file of weights."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)


def test_bfloat16_is_chosen_by_the_kind_of_model(chain: Chain) -> None:
    """Decoder and encoder each compute in their dtype of `numerics.dtype`; weights stay in float32."""
    import torch

    numerics = NUMERICS.model_copy(update={"dtype": Dtypes(decoder="bfloat16", encoder="float32")})
    for build, dtype in ((models.new_decoder, torch.bfloat16), (models.new_encoder, torch.float32)):
        model = build(Shape(**SHAPE), chain.tokenizer(), 64, numerics)
        with models.autocast(model, numerics):
            assert model(input_ids=torch.arange(8)[None]).logits.dtype == dtype
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_shape_rejects_uneven_heads() -> None:
    """The message has both numbers."""
    with pytest.raises(ValidationError, match=r"hidden \(60\) must be an even multiple of heads \(8\)"):
        Shape(hidden=60, layers=1, heads=8, feed_forward=64)


def test_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage stops with a message that names the setting."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match=r"numerics\.device is cuda"):
        torch_setup.prepare_torch(NUMERICS.model_copy(update={"device": "cuda"}), 1)


def test_batch_at_reshuffles_each_epoch() -> None:
    """Each epoch contains every item once in an order of its own; a batch may span two epochs."""
    items = list(range(10))
    items_read = [item for step in range(10) for item in batch_at(items, 4, 7, step)]
    epochs = [items_read[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert batch_at(items, 4, 7, 5) == items_read[20:24]
    assert [item for step in range(10) for item in batch_at(items, 4, 8, step)] != items_read
