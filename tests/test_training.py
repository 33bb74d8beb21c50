"""The training loop: its schedules and optimizers against plain arithmetic, and resuming that leaves no trace."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from tasks.common import identity, models
from tasks.common.checkpoints import Store
from tasks.common.models import Shape
from tasks.common.settings import Checkpoints, Dtypes
from tasks.common.stage import Job, StageError
from tasks.common.training import History, Optimizer, batch_at, build_optimizer, rate_at, train
from tests.training_fixtures import NUMERICS, OPTIMIZER, SHAPE, Chain, chain, config

if TYPE_CHECKING:
    import torch

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

STEPS = 12


def settings(**changes: Any) -> Optimizer:
    """Return settings of an optimizer, some of them changed."""
    return Optimizer.model_validate({**OPTIMIZER, **changes})


def make_job(url: str, recipe: str = "r", every: float = 1e9) -> Job:
    """Return a job with nothing but a checkpoint store."""
    return Job("toy", None, {}, {}, 1, NUMERICS, recipe, Checkpoints(url=url, every_seconds=every))


class Toy:
    """A little regression whose batch, and its noise, is a pure function of the step."""

    def __init__(self, seed: int = 0) -> None:
        import torch

        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.seen: list[int] = []
        self.stop_at: int | None = None

    def loss_at(self, step: int) -> tuple["torch.Tensor", dict[str, "torch.Tensor"], int]:
        """Return the mean squared error on a step's batch."""
        import torch

        if step == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(step)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (self.model(x)[:, 0] - x.sum(1)).square().mean()
        return loss, {"half": loss / 2}, x.numel()

    def weights(self) -> list[list[float]]:
        """Return all weights."""
        return [parameter.flatten().tolist() for parameter in self.model.parameters()]


# Schedules


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]),
        ("cosine", [0.5, 1.0] + [0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]),
    ],
)
def test_schedules(schedule: str, rates: list[float]) -> None:
    """A fifth of ten steps of warm-up, then the schedule on its way down to a tenth of the peak."""
    optimizer = settings(schedule=schedule, warmup=0.2, learning_rate=1.0)
    assert [rate_at(optimizer, step, 10) for step in range(10)] == pytest.approx(rates)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_the_rate_is_never_above_the_peak_nor_nothing(schedule: str, steps: int) -> None:
    """Short runs and long ones: the first step already learns, and the last one still does."""
    optimizer = settings(schedule=schedule, warmup=0.1)
    rates = [rate_at(optimizer, step, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(optimizer.learning_rate)
    assert min(rates) > 0


# Optimizers


def plain_update(name: str, decay: float, gradients: list[float], rate: float, weight: float) -> float:
    """Return a matrix entry after a few updates, computed as in the papers (Kingma & Ba; Loshchilov & Hutter)."""
    first = second = 0.0
    for t, gradient in enumerate(gradients, 1):
        if name == "adamw":
            weight -= rate * decay * weight
        else:
            gradient += decay * weight
        first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient**2
        step = gradient if name == "sgd" else first / (1 - 0.9**t) / (math.sqrt(second / (1 - 0.98**t)) + 1e-9)
        weight -= rate * step
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_do_what_their_papers_say(name: str, decay: float) -> None:
    """Five updates of a matrix entry and of a bias, which does not decay, against plain arithmetic."""
    import torch

    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, 0.7)
    torch.nn.init.constant_(layer.bias, 0.7)
    optimizer = build_optimizer(settings(name=name, weight_decay=decay, learning_rate=0.05), layer)
    gradients = [1.0, -0.5, 2.0, 0.25, 0.0]
    for gradient in gradients:
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    assert layer.weight.item() == pytest.approx(plain_update(name, decay, gradients, 0.05, 0.7), rel=1e-5)
    assert layer.bias.item() == pytest.approx(plain_update(name, 0.0, gradients, 0.05, 0.7), rel=1e-5)


def test_frozen_weights_are_not_the_optimizers() -> None:
    """What a method leaves alone takes neither memory nor decay."""
    import torch

    layer = torch.nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    groups = build_optimizer(settings(), layer).param_groups
    assert [parameter is layer.bias for group in groups for parameter in group["params"]] == [True]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "lion"}, "'sgd', 'adam' or 'adamw'"),
        ({"schedule": "step"}, "'cosine', 'linear' or 'constant'"),
        ({"learning_rate": 0.0}, "greater than 0"),
        ({"momentum": 0.9}, "Extra inputs are not permitted"),
    ],
)
def test_an_unknown_setting_is_told_with_the_choices(changes: dict[str, Any], sentence: str) -> None:
    """A name that does not exist is an error that names those that do."""
    with pytest.raises(ValidationError, match=sentence):
        settings(**changes)


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
    history = train(toy.model, toy.loss_at, settings(learning_rate=0.05), 60, job)
    assert toy.seen == list(range(60))
    assert history.rows[-1]["loss"] < 0.2 * history.rows[0]["loss"]
    assert [row["half"] for row in history.rows] == pytest.approx([row["loss"] / 2 for row in history.rows], abs=1e-6)
    assert job.figures["tokens_per_second"] > 0
    assert job.figures["resumed_at_step"] == 0


def test_long_gradients_are_cut_to_their_limit(tmp_path: Path) -> None:
    """One SGD step at rate 1 moves the weights by exactly the limit where the gradient is longer."""
    import torch

    toy = Toy()
    before = torch.cat([parameter.detach().flatten().clone() for parameter in toy.model.parameters()])
    optimizer = settings(name="sgd", learning_rate=1.0, weight_decay=0.0, clip=0.125, schedule="constant")
    history = train(toy.model, toy.loss_at, optimizer, 1, make_job(str(tmp_path)))
    after = torch.cat([parameter.detach().flatten() for parameter in toy.model.parameters()])
    assert history.rows[0]["gradient_norm"] > 0.125
    assert (after - before).norm().item() == pytest.approx(0.125, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", [False, True])
def test_a_loss_that_is_no_number_stops_with_a_sentence(value: float, part: bool, tmp_path: Path) -> None:
    """The message names step, steps and learning rate, and the weights are those of the last good step."""
    toy, reference = Toy(), Toy()
    train(reference.model, reference.loss_at, settings(schedule="constant", warmup=0.0), 3, make_job(str(tmp_path)))

    def loss_at(step: int) -> tuple["torch.Tensor", dict[str, "torch.Tensor"], int]:
        loss, parts, read = toy.loss_at(step)
        bad = loss * value if step == 3 else loss
        return (loss, {"half": bad}, read) if part else (bad, parts, read)

    with pytest.raises(StageError, match=r"step 4 of 10 .*learning_rate \(now 0\.003\)"):
        train(toy.model, loss_at, settings(schedule="constant", warmup=0.0), 10, make_job(str(tmp_path)))
    assert toy.weights() == reference.weights()


# Checkpoints


@pytest.fixture(params=["file", "memory"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address of a checkpoint store that nobody else uses."""
    return {"file": f"file://{tmp_path}/store", "memory": f"memory://{tmp_path.name}/store"}[request.param]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("stop", [1, 5, STEPS - 1])
def test_resumed_is_uninterrupted(name: str, stop: int, store_url: str) -> None:
    """Killed at any step and begun again from other weights, a run ends with the same bits and the same curves."""
    whole, first, second = Toy(seed=0), Toy(seed=0), Toy(seed=9)
    expected = train(whole.model, whole.loss_at, settings(name=name), STEPS, make_job(store_url, "whole"))
    first.stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        train(first.model, first.loss_at, settings(name=name), STEPS, make_job(store_url, every=1e-9))
    again = make_job(store_url)
    history = train(second.model, second.loss_at, settings(name=name), STEPS, again)
    assert second.seen == list(range(stop, STEPS))
    assert again.figures["resumed_at_step"] == stop
    assert second.weights() == whole.weights()
    assert history.rows == expected.rows


def test_another_recipe_is_never_resumed(store_url: str) -> None:
    """Checkpoints of other settings lie in the same store and are left alone."""
    first, second = Toy(), Toy()
    train(first.model, first.loss_at, settings(), STEPS, make_job(store_url, "one", every=1e-9))
    train(second.model, second.loss_at, settings(), STEPS, make_job(store_url, "another"))
    assert second.seen == list(range(STEPS))


def test_one_checkpoint_is_kept_until_the_stage_is_complete(store_url: str) -> None:
    """Each checkpoint drops the one before it, and the harness's last call drops them all."""
    toy, job = Toy(), make_job(store_url, every=1e-9)
    train(toy.model, toy.loss_at, settings(), STEPS, job)
    store = Store.of(job)
    assert [Path(path).name for path in store.filesystem.ls(store.folder, detail=False)] == [f"{STEPS:09d}"]
    for call in job.when_complete:
        call()
    assert not store.filesystem.exists(store.folder)


def test_checkpoints_wait_for_their_time(store_url: str) -> None:
    """A run that is shorter than the time between two checkpoints writes none."""
    toy, job = Toy(), make_job(store_url, every=3600)
    train(toy.model, toy.loss_at, settings(), STEPS, job)
    assert Store.of(job).filesystem.ls(Store.of(job).folder) == []


def test_a_store_that_cannot_be_written_to_is_told_before_the_first_step(tmp_path: Path) -> None:
    """With its address and the setting, not in a traceback when the first checkpoint is due."""
    (tmp_path / "file").write_text("no folder")
    toy = Toy()
    with pytest.raises(StageError, match=r"checkpoints cannot be written to .*/file .*placement\.checkpoints\.url"):
        train(toy.model, toy.loss_at, settings(), STEPS, make_job(str(tmp_path / "file")))
    assert toy.seen == []


def test_checkpoints_that_cannot_be_dropped_fail_no_complete_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The outputs are in place by then, and the run would be repeated for nothing."""
    store = Store.of(make_job(str(tmp_path / "store")))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(store.filesystem, "rm", refuse)
    store.clear()
    assert "could not be dropped (read-only)" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["state.safetensors", "state.json"])
def test_half_a_checkpoint_is_none(lost: str, store_url: str) -> None:
    """What a move that was cut short left is neither read nor in the way of the next checkpoint."""
    toy, job = Toy(), make_job(store_url, every=1e-9)
    toy.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        train(toy.model, toy.loss_at, settings(), STEPS, job)
    store = Store.of(job)
    store.filesystem.rm(f"{store.folder}/000000006/{lost}")
    again, whole = Toy(), Toy()
    train(again.model, again.loss_at, settings(), STEPS, make_job(store_url, every=1e-9))
    train(whole.model, whole.loss_at, settings(), STEPS, make_job(store_url, "whole"))
    assert again.seen == list(range(STEPS))
    assert again.weights() == whole.weights()
    assert [Path(path).name for path in store.filesystem.ls(store.folder, detail=False)] == [f"{STEPS:09d}"]


# Whole stages

LORA = {"name": "lora", "rank": 4, "alpha": 8}
WHOLE = [
    ("pretrain@clm", {"steps": 5, "batch": 4}),
    ("pretrain@mlm", {"steps": 5, "batch": 4}),
    ("finetune", {"steps": 5, "batch": 4}),
    ("finetune", {"steps": 5, "batch": 4, "method": LORA}),
    ("reward", {"steps": 5, "batch": 2}),
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
