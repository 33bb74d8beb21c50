"""The training loop: its schedules and optimizers against plain arithmetic, and resuming that leaves no trace."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest
from pydantic import ValidationError

from tasks.common import identity
from tasks.common.modelling import models
from tasks.common.modelling.models import Shape
from tasks.common.settings import Checkpoints, Dtypes
from tasks.common.stage import Job, StageError
from tasks.common.training.checkpoints import Store
from tasks.common.training.loop import Drawn, History, Share, Training, batch_at, train
from tasks.common.training.parallel import World
from tests.training_fixtures import CONSTANT, LORA, NUMERICS, RULE, RULES, SHAPE, Chain, chain, config

if TYPE_CHECKING:
    import torch

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

STEPS = 12
ALONE = World(0, 1, "data", "cpu")


def settings(name: str = "adamw", steps: int = STEPS, accumulate: int = 1, **changes: Any) -> Training:
    """Return what the loop is told, some of the optimizer's settings changed."""
    optimizer = {"name": name, **RULE, **RULES[name], **changes}
    return Training.model_validate({"steps": steps, "accumulate": accumulate, "optimizer": optimizer})


def make_job(url: str, recipe: str = "r", every: float = 1e9) -> Job:
    """Return a job with nothing but a checkpoint store."""
    return Job("toy", None, {}, {}, 1, NUMERICS, recipe, Checkpoints(url=url, every_seconds=every))


class Toy:
    """A little regression whose batch, and its noise, is a pure function of the step."""

    weights: ClassVar = {"error": 0.5, "size": 0.25}
    steady = True

    def __init__(self, seed: int = 0) -> None:
        import torch

        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)
        )
        self.seen: list[int] = []
        self.stop_at: int | None = None
        self.spoilt: tuple[int, str, float] | None = None

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's numbers."""
        import torch

        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))[share.index :: share.count]
        names = [f"row {number}" for number in range(16)[share.rows]]
        return Drawn((step, x), {"error": len(x), "size": 4 * len(x)}, x.numel(), names)

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed squared error, and that of a second target."""
        step, x = drawn.content
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(step)
        found = self.model(x)[:, 0]
        sums = {"error": (found - x.sum(1)).square().sum(), "size": (found[:, None] - x).square().sum()}
        if self.spoilt and self.spoilt[0] == step:
            sums[self.spoilt[1]] = sums[self.spoilt[1]] * self.spoilt[2]
        return sums

    def values(self) -> list[list[float]]:
        """Return all weights."""
        return [parameter.flatten().tolist() for parameter in self.model.parameters()]


# Curves


def test_curves_average_over_a_few_steps(tmp_path: Path) -> None:
    """A row holds the means since the last one, the last row whatever is left, and the file says the same."""
    history = History(every=2)
    for step, loss in enumerate([1.0, 3.0, 5.0, 6.0, 10.0]):
        history.add(step, {"loss": loss})
    history.flush(4)
    assert history.rows == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 5.5}, {"step": 5, "loss": 10.0}]
    history.write(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == history.rows


# The loop


def test_the_loop_learns_and_says_how_it_went(tmp_path: Path) -> None:
    """Every step once and in order, a falling loss, its parts in the curves, its speed among what was measured."""
    toy, job = Toy(), make_job(str(tmp_path))
    _, history = train(toy.model, toy, settings(steps=60, learning_rate=0.05), job)
    assert toy.seen == list(range(60))
    assert history.rows[-1]["error_loss"] < 0.3 * history.rows[0]["error_loss"]
    weighed = [0.5 * row["error_loss"] + 0.25 * row["size_loss"] for row in history.rows]
    assert [row["loss"] for row in history.rows] == pytest.approx(weighed, abs=2e-6)
    assert job.figures["tokens_per_second"] > 0
    assert job.figures["resumed_at_step"] == 0


@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_a_batch_in_parts_is_the_batch(accumulate: int, tmp_path: Path) -> None:
    """However unequal its parts, a step is that of the whole batch, up to the rounding of sums in float32."""
    import torch

    whole, parts = Toy(), Toy()
    for toy in (whole, parts):
        cast(torch.nn.Dropout, toy.model[2]).p = 0.0  # dropout draws anew for every part
    _, expected = train(whole.model, whole, settings(name="sgd"), make_job(str(tmp_path), "whole"))
    _, history = train(
        parts.model, parts, settings(name="sgd", accumulate=accumulate), make_job(str(tmp_path), "parts")
    )
    assert parts.seen == [step for step in range(STEPS) for _ in range(accumulate)]
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in history.rows] == pytest.approx([row["loss"] for row in expected.rows], rel=1e-5)


def test_more_parts_than_rows_are_as_many_as_there_are_rows(tmp_path: Path) -> None:
    """A part without anything to read is left out."""
    toy = Toy()
    train(toy.model, toy, settings(steps=1, accumulate=40), make_job(str(tmp_path)))
    assert toy.seen == [0] * 16


def test_long_gradients_are_cut_to_their_limit(tmp_path: Path) -> None:
    """One SGD step at rate 1 moves the weights by exactly the limit where the gradient is longer."""
    import torch

    toy = Toy()
    before = torch.cat([parameter.detach().flatten().clone() for parameter in toy.model.parameters()])
    told = settings(name="sgd", steps=1, learning_rate=1.0, weight_decay=0.0, clip=0.125, schedule=CONSTANT)
    _, history = train(toy.model, toy, told, make_job(str(tmp_path)))
    after = torch.cat([parameter.detach().flatten() for parameter in toy.model.parameters()])
    assert history.rows[0]["gradient_norm"] > 0.125
    assert (after - before).norm().item() == pytest.approx(0.125, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("term", ["error", "size"])
def test_a_loss_that_is_no_number_stops_with_a_sentence(value: float, term: str, tmp_path: Path) -> None:
    """It names step, batch and rate; the weights are those of the last good step, and kept in the store."""
    toy, reference = Toy(), Toy()
    told = settings(steps=10, schedule=CONSTANT)
    train(reference.model, reference, told.model_copy(update={"steps": 3}), make_job(str(tmp_path), "reference"))
    toy.spoilt = (3, term, value)
    with pytest.raises(
        StageError, match=r"step 4 of 10 .*row 0, row 1, .* and 4 more.*kept in .*rate.* 0\.003"
    ) as told_so:
        train(toy.model, toy, told, make_job(str(tmp_path)))
    assert "loss" in str(told_so.value)
    assert toy.values() == reference.values()
    store = Store.of(make_job(str(tmp_path)), ALONE)
    assert [Path(path).name for path in store.filesystem.ls(store.folder, detail=False)] == ["000000003"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["a bit", "half"])
def test_a_damaged_checkpoint_is_told_and_not_gone_on_from(name: str, harm: str, tmp_path: Path) -> None:
    """A flipped bit would else end in other weights, without a word."""
    toy, told, job = Toy(), settings(steps=6), make_job(str(tmp_path), every=1e-9)
    toy.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        train(toy.model, toy, told, job)
    (file,) = Path(tmp_path).rglob(name)
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content if harm == "a bit" else content[: len(content) // 2])
    again = Toy()
    with pytest.raises(StageError, match=r"the checkpoint .*/000000004 is damaged.* Remove that folder to begin anew"):
        train(again.model, again, told, job)


def test_two_runs_may_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clones at once, say: what one is about to drop the other has dropped, and both end as one alone does."""
    toys = [Toy(), Toy()]
    train(toys[0].model, toys[0], settings(), make_job(str(tmp_path), "alone"))
    listed = Store._folders
    monkeypatch.setattr(Store, "_folders", lambda store: [*listed(store), "000000000"])
    monkeypatch.setattr(Store, "_complete", lambda store, folder: folder != "000000000")
    train(toys[1].model, toys[1], settings(), make_job(str(tmp_path), "shared", every=1e-9))
    assert toys[0].values() == toys[1].values()


def test_a_checkpoint_that_another_run_took_away_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it was being written: training goes on, and the next one is written."""
    toy, write, calls = Toy(), Store._write, iter(range(99))

    def taken(store: Store, step: int, *contents: bytes) -> None:
        if next(calls) == 0:
            raise FileNotFoundError("gone")
        write(store, step, *contents)

    monkeypatch.setattr(Store, "_write", taken)
    toy.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        train(toy.model, toy, settings(), make_job(str(tmp_path), every=1e-9))
    assert "the checkpoint of step 1 was not kept, since another run shares" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*/*/*")] == ["000000003"]


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.")]
)
def test_an_end_of_memory_says_what_to_change(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting by its name, what it is and what to make of it."""
    toy = Toy()

    def sums(drawn: Drawn) -> Any:
        raise error

    monkeypatch.setattr(toy, "sums", sums)
    with pytest.raises(StageError, match=r"memory ended .*Set toy\.accumulate to 4 \(now 2\)"):
        train(toy.model, toy, settings(accumulate=2), make_job(str(tmp_path)))


@pytest.mark.parametrize(
    "told", ["mat1 and mat2 shapes cannot be multiplied", "CUDA error: an illegal memory access was encountered"]
)
def test_other_errors_are_not_taken_for_an_end_of_memory(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape that does not fit stays what it is, and so does a fault of a kernel's."""
    toy = Toy()

    def sums(drawn: Drawn) -> Any:
        raise RuntimeError(told)

    monkeypatch.setattr(toy, "sums", sums)
    with pytest.raises(RuntimeError, match=told):
        train(toy.model, toy, settings(), make_job(str(tmp_path)))


# Checkpoints


@pytest.fixture(params=["file", "memory"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address of a checkpoint store that nobody else uses."""
    return {"file": f"file://{tmp_path}/store", "memory": f"memory://{tmp_path.name}/store"}[request.param]


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("stop", [1, 5, STEPS - 1])
def test_resumed_is_uninterrupted(name: str, stop: int, store_url: str) -> None:
    """Killed at any step and begun again from other weights, a run ends with the same bits and the same curves."""
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
    """Checkpoints of other settings lie in the same store and are left alone."""
    first, second = Toy(), Toy()
    train(first.model, first, settings(), make_job(store_url, "one", every=1e-9))
    train(second.model, second, settings(), make_job(store_url, "another"))
    assert second.seen == list(range(STEPS))


def test_one_checkpoint_is_kept_until_the_stage_is_complete(store_url: str) -> None:
    """Each checkpoint drops the one before it, and the harness's last call drops them all."""
    toy, job = Toy(), make_job(store_url, every=1e-9)
    train(toy.model, toy, settings(), job)
    store = Store.of(job, ALONE)
    assert [Path(path).name for path in store.filesystem.ls(store.folder, detail=False)] == [f"{STEPS:09d}"]
    for call in job.when_complete:
        call()
    assert not store.filesystem.exists(store.folder)


def test_checkpoints_wait_for_their_time(store_url: str) -> None:
    """A run that is shorter than the time between two checkpoints writes none."""
    toy, job = Toy(), make_job(store_url, every=3600)
    train(toy.model, toy, settings(), job)
    assert Store.of(job, ALONE).filesystem.ls(Store.of(job, ALONE).folder) == []


def test_a_store_that_cannot_be_written_to_is_told_before_the_first_step(tmp_path: Path) -> None:
    """With its address and the setting, not in a traceback when the first checkpoint is due."""
    (tmp_path / "file").write_text("no folder")
    toy = Toy()
    with pytest.raises(StageError, match=r"checkpoints cannot be written to .*/file .*placement\.checkpoints\.url"):
        train(toy.model, toy, settings(), make_job(str(tmp_path / "file")))
    assert toy.seen == []


def test_checkpoints_that_cannot_be_dropped_fail_no_complete_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The outputs are in place by then, and the run would be repeated for nothing."""
    store = Store.of(make_job(str(tmp_path / "store")), ALONE)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(store.filesystem, "rm", refuse)
    store.clear()
    assert "could not be dropped (read-only)" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused_by_name(store_url: str) -> None:
    """With the first tensor that does not fit, and what to do."""
    import torch

    toy, wider = Toy(), Toy()
    train(toy.model, toy, settings(), make_job(store_url, every=1e-9))
    wider.model[0], wider.model[3] = torch.nn.Linear(4, 9), torch.nn.Linear(9, 1)
    with pytest.raises(StageError, match=r"0+12 does not fit these settings: 0\.bias is \(8,\) there and \(9,\) here"):
        train(wider.model, wider, settings(), make_job(store_url))
    wider.model.requires_grad_(False)[0].requires_grad_(True)
    wider.model[0] = torch.nn.Linear(4, 8)
    with pytest.raises(StageError, match=r"3\.bias is \(1,\) there and not trained here"):
        train(wider.model, wider, settings(), make_job(store_url))


@pytest.mark.parametrize("lost", ["state.safetensors", "state.json"])
def test_half_a_checkpoint_is_none(lost: str, store_url: str) -> None:
    """What a move that was cut short left is neither read nor in the way of the next checkpoint."""
    toy, job = Toy(), make_job(store_url, every=1e-9)
    toy.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        train(toy.model, toy, settings(), job)
    store = Store.of(job, ALONE)
    store.filesystem.rm(f"{store.folder}/000000006/{lost}")
    again, whole = Toy(), Toy()
    train(again.model, again, settings(), make_job(store_url, every=1e-9))
    train(whole.model, whole, settings(), make_job(store_url, "whole"))
    assert again.seen == list(range(STEPS))
    assert again.values() == whole.values()
    assert [Path(path).name for path in store.filesystem.ls(store.folder, detail=False)] == [f"{STEPS:09d}"]


# Whole stages

DORA = {**LORA, "dora": True, "dropout": 0.1}
WHOLE = [
    ("pretrain@clm", {"steps": 5, "batch": 4}),
    ("pretrain@mlm", {"steps": 5, "batch": 4}),
    ("finetune", {"steps": 5, "batch": 4}),
    ("finetune", {"steps": 5, "batch": 4, "method": DORA}),
    ("finetune", {"steps": 5, "batch": 4, "method": {"name": "adapter", "width": 5}}),
    ("finetune", {"steps": 5, "batch": 4, "task": {"name": "chat", "answers": "all", "packing": 48}}),
    ("reward@policy", {"steps": 5, "batch": 2}),
    ("prune", {"steps": 5}),
]


@pytest.mark.parametrize(("name", "changes"), WHOLE)
def test_a_killed_stage_ends_as_if_it_had_not_been(
    name: str, changes: dict[str, Any], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the stage's own code: model, curves and metrics of a resumed run are those of one in one go."""
    tiny = config(name, **changes)
    numerics = NUMERICS.model_copy(update={"dtype": Dtypes(decoder="bfloat16", encoder="float32")})
    every = Checkpoints(url=f"{tmp_path}/store", every_seconds=1e-9)
    job = chain.job(name, tiny, tmp_path / "whole", numerics=numerics)
    expected = chain.run(job, tiny), hashes(job)
    keep = Store.keep

    def killed(self: Store, step: int, *parts: Any) -> None:
        keep(self, step, *parts)
        if step == 3:
            raise KeyboardInterrupt

    again = chain.job(name, tiny, tmp_path / "again", numerics=numerics, checkpoints=every)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            chain.run(again, tiny)
    assert (chain.run(again, tiny), hashes(again)) == expected
    assert again.figures["resumed_at_step"] == 3


def hashes(job: Job) -> dict[str, str]:
    """Return the hash of each of a job's outputs."""
    return {name: identity.tree_hash(path) for name, path in job.outputs.items()}


@pytest.mark.parametrize(("name", "changes"), [*WHOLE, ("ppo", {"iterations": 2, "episodes": 4, "minibatch": 2})])
def test_a_seed_gives_the_same_bytes_every_time(
    name: str, changes: dict[str, Any], chain: Chain, tmp_path: Path
) -> None:
    """Runs with one seed agree bit for bit, whatever was drawn at random before; another seed differs."""
    import torch

    tiny, found = config(name, **changes), []
    for number, seed in enumerate((1, 1, 2)):
        torch.rand(number)
        job = chain.job(name, tiny, tmp_path / str(number), seed=seed)
        chain.run(job, tiny)
        found.append(hashes(job))
    assert found[0] == found[1]
    assert found[0]["model"] != found[2]["model"]


# Models


@pytest.mark.parametrize("build", [models.new_decoder, models.new_encoder])
def test_a_saved_model_is_the_model(build: Callable[..., Any], chain: Chain, tmp_path: Path) -> None:
    """What is saved is loaded with the same weights and the same logits, and tied weights count once."""
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
    assert models.parameters(loaded) == models.parameters(model) == stored


def stored_shapes(path: Path) -> list[list[int]]:
    """Return the shapes of the tensors in a file of weights."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)


def test_bfloat16_is_chosen_by_the_kind_of_model(chain: Chain) -> None:
    """Decoder and encoder each compute in the type that `numerics.dtype` gives their kind; weights stay in float32."""
    import torch

    numerics = NUMERICS.model_copy(update={"dtype": Dtypes(decoder="bfloat16", encoder="float32")})
    for build, dtype in ((models.new_decoder, torch.bfloat16), (models.new_encoder, torch.float32)):
        model = build(Shape(**SHAPE), chain.tokenizer(), 64, numerics)
        with models.autocast(model, numerics):
            assert model(input_ids=torch.arange(8)[None]).logits.dtype == dtype
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_heads_that_do_not_fit_are_told() -> None:
    """A width that heads cannot share evenly is an error with both figures."""
    with pytest.raises(ValidationError, match=r"hidden \(60\) must be an even multiple of heads \(8\)"):
        Shape(hidden=60, layers=1, heads=8, feed_forward=64)


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device class that this machine lacks stops the stage with a sentence."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match=r"numerics\.device is cuda"):
        models.prepare_torch(NUMERICS.model_copy(update={"device": "cuda"}), 1)


def test_items_are_read_in_endless_epochs() -> None:
    """Each epoch reads all of them once in an order of its own; a batch may straddle two epochs."""
    items = list(range(10))
    read = [item for step in range(10) for item in batch_at(items, 4, 7, step)]
    epochs = [read[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert batch_at(items, 4, 7, 5) == read[20:24]
    assert [item for step in range(10) for item in batch_at(items, 4, 8, step)] != read
