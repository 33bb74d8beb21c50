"""Live curves: what each service holds is read back with its own library; FLOPs are held to torch's own counter."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from tasks.common.modelling import methods, models
from tasks.common.modelling.methods import Adapter, Lora, Top
from tasks.common.modelling.models import Shape
from tasks.common.settings import Checkpoints, Dtypes, Service, SettingsError, Tracking, check, read_params
from tasks.common.stage import Job
from tasks.common.training import flops, tracking
from tasks.common.training.flops import Work
from tasks.common.training.loop import History, train
from tests.conftest import ROOT, Project
from tests.test_training import Toy, settings
from tests.training_fixtures import LORA, NUMERICS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

SHAPE = Shape(hidden=64, layers=3, heads=4, feed_forward=96)
STEPS = 10


@pytest.fixture
def project(toy: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project under git and DVC to work in."""
    monkeypatch.chdir(toy.path)
    monkeypatch.setattr(tracking, "HURRIED_S", 60.0)  # what takes a second takes ten on a busy machine
    return toy


def make_job(*to: Service, run: str = "run-1", every: int = 2, seconds: float = 1e9) -> Job:
    """Return a job that is logged to these services."""
    return Job(
        "pretrain", "clm", {}, {}, 1, NUMERICS, "r", Checkpoints(url="checkpoints", every_seconds=seconds),
        Tracking(to=list(to), every=every), Path("runs", run),
    )  # fmt: skip


def fit(job: Job, stop: int | None = None, work: Work | None = None) -> tuple[History, list[list[float]]]:
    """Train a little regression, to be interrupted before a step, and return its curve and its weights."""
    toy = Toy()
    toy.stop_at = stop
    _, history = train(toy.model, toy, settings(steps=STEPS), job, work)
    return history, toy.values()


def dvclive_curve(job: Job, name: str) -> dict[int, float]:
    """Return one of DVCLive's curves, step to value; a step that is there twice is an error."""
    with (job.run_folder / f"tracking/pretrain@clm/dvclive/plots/metrics/{name}.tsv").open() as file:
        rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file, delimiter="\t")]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def tensorboard_curve(job: Job, name: str) -> dict[int, float]:
    """Return one of TensorBoard's curves, as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job.run_folder / "tracking/pretrain@clm/tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


# What is written


FIGURES = {
    "loss", "error_loss", "size_loss", "gradient_norm", "learning_rate", "tokens_per_second", "mfu",
    "peak_memory_bytes",
}  # fmt: skip


def test_curves_are_those_of_the_training(project: Project) -> None:
    """Every second step, the same numbers in both services and in the stage's own curve, and all the figures."""
    job = make_job("dvclive", "tensorboard")
    history, _ = fit(job, work=Work(flops_per_token=100.0, ceiling=1e9))
    losses = {int(row["step"]): row["loss"] for row in history.rows}
    expected = {step: losses[step] for step in (2, 4, 6, 8, 10)}
    assert dvclive_curve(job, "loss") == pytest.approx(expected, abs=1e-5)
    assert tensorboard_curve(job, "loss") == pytest.approx(expected, abs=1e-5)
    last = json.loads((job.run_folder / "tracking/pretrain@clm/dvclive/metrics.json").read_text())
    assert set(last) == FIGURES | {"step"}
    assert last["step"] == STEPS
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * 100 / 1e9)
    assert last["peak_memory_bytes"] > 50e6
    assert set(tensorboard_curve(job, "mfu")) == set(expected)


def test_nothing_is_written_but_the_runs_own_folder(project: Project) -> None:
    """Neither into what git or DVC tracks, nor as an experiment."""
    before = project.git("for-each-ref"), (project.path / "dvc.yaml").read_bytes()
    fit(make_job("dvclive", "tensorboard"))
    assert project.git("status", "--porcelain") == ""
    assert (project.git("for-each-ref"), (project.path / "dvc.yaml").read_bytes()) == before
    made = {path.parts[0] for path in (path.relative_to(project.path) for path in project.path.rglob("tracking"))}
    assert made == {"runs"}


def test_a_run_that_is_watched_has_the_same_bytes(project: Project) -> None:
    unwatched, watched = make_job(run="a"), make_job("dvclive", "tensorboard", run="b")
    first, second = fit(unwatched), fit(watched)
    assert (first[0].rows, first[1]) == (second[0].rows, second[1])
    assert not (unwatched.run_folder / "tracking").exists()


def test_the_last_step_is_never_missing(project: Project) -> None:
    """Nor a curve that is shorter than the distance between two points."""
    job = make_job("dvclive", every=7)
    fit(job)
    assert set(dvclive_curve(job, "loss")) == {7, 10}


def test_speed_is_that_since_the_last_point(project: Project) -> None:
    """A slow stretch shows where it was; the utilisation over the whole run is kept among what was measured."""
    job = make_job("dvclive", every=1)
    with tracking.opened(job, work=Work(flops_per_token=10.0, ceiling=1e5)) as tracker:
        for step, seconds in enumerate([1.0, 4.0, 1.0], 1):
            tracker.started -= seconds  # as if the points before lay that much further back
            tracker.clock = time.perf_counter() - seconds
            tracker.log(step, {"loss": 1.0}, tokens=100)
    speeds = dvclive_curve(job, "tokens_per_second")
    assert list(speeds.values()) == pytest.approx([100.0, 25.0, 100.0], rel=0.2)
    assert job.figures["mfu"] == pytest.approx(300 * 10 / 6.0 / 1e5, rel=0.2)


def test_ppo_is_watched_too(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One point an iteration, however rarely others have one."""
    chain.path("data/reward/policy/model")
    tiny = config("ppo", iterations=2)
    job = chain.job("ppo", tiny, tmp_path, tracking=Tracking(to=["tensorboard"], every=100), run_folder=tmp_path / "r")
    chain.run(job, tiny)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "r/tracking/ppo/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3]
    assert {"kl", "gradient_norm", "learning_rate", "tokens_per_second"} <= set(events.Tags()["scalars"])


# Resuming


@pytest.mark.parametrize("stop", [5, 7])
def test_a_resumed_run_goes_on_in_its_own_folder(project: Project, stop: int) -> None:
    """With every step once, also those that were logged after the last checkpoint and lost with it."""
    job, whole = make_job("dvclive", "tensorboard", every=1), make_job("dvclive", run="whole", every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(make_job("dvclive", "tensorboard", every=1, seconds=1e-9), stop=4)
    for path in (project.path / "checkpoints").rglob("*"):
        assert "000000005" not in path.name
    with tracking.opened(job, first=4) as tracker:  # it logs on, and is killed before its next checkpoint
        for step in range(5, stop + 1):
            tracker.log(step, {"loss": -1.0})
    fit(job)
    assert job.figures["resumed_at_step"] == 4
    expected = {int(row["step"]): row["loss"] for row in fit(whole)[0].rows}
    assert dvclive_curve(job, "loss") == pytest.approx(expected, abs=1e-5)
    assert tensorboard_curve(job, "loss") == pytest.approx(expected, abs=1e-5)


def test_a_run_resumed_elsewhere_brings_its_curve_along(project: Project) -> None:
    """Another run's folder, or another worker's, starts with the rows that the checkpoint holds."""
    with pytest.raises(KeyboardInterrupt):
        fit(make_job("dvclive", run="killed", every=1, seconds=1e-9), stop=6)
    job = make_job("dvclive", "tensorboard", run="next", every=1)
    history, _ = fit(job)
    expected = {int(row["step"]): row["loss"] for row in history.rows}
    assert set(expected) == set(range(1, STEPS + 1))
    assert dvclive_curve(job, "loss") == pytest.approx(expected, abs=1e-5)
    assert tensorboard_curve(job, "gradient_norm").keys() == expected.keys()
    assert set(dvclive_curve(job, "tokens_per_second")) == {7, 8, 9, 10}


def test_a_run_that_starts_again_drops_what_was_there(project: Project) -> None:
    """Without a checkpoint nothing of the first attempt counts."""
    job = make_job("dvclive", "tensorboard", every=1)
    with tracking.opened(job) as tracker:
        for step in range(1, 30):
            tracker.log(step, {"loss": -1.0})
    fit(job)
    assert set(dvclive_curve(job, "loss")) == set(tensorboard_curve(job, "loss")) == set(range(1, STEPS + 1))


# What goes wrong


def test_a_service_that_fails_ends_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It says so once; the other one and the training go on."""
    broken = project.path / "runs" / "broken"
    broken.mkdir(parents=True)
    (broken / "tensorboard.py").write_text("raise OSError('no route to host')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    job = make_job("tensorboard", "dvclive")
    history, _ = fit(job)
    said = capfd.readouterr().err  # in which the progress bar may share the message's line
    assert said.count("live logging") == 1
    assert "live logging to tensorboard has ended (no route to host); the stage goes on" in said
    assert len(history.rows) == STEPS
    assert set(dvclive_curve(job, "loss")) == {2, 4, 6, 8, 10}


@pytest.mark.parametrize("points", [1, 5000])
def test_a_service_that_hangs_holds_nobody_up(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], points: int
) -> None:
    """Neither while it takes nothing, with its pipe long full, nor for longer than its time at the end."""
    (project.path / "hangs.py").write_text("import time; time.sleep(600)")  # longer than this test may take
    monkeypatch.setattr(tracking, "WRITER", project.path / "hangs.py")
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)
    with tracking.opened(make_job("tensorboard", every=1)) as tracker:
        for step in range(1, points + 1):
            tracker.log(step, {"loss": 1.0})
    assert "tensorboard was still busy; its last points may be missing" in capsys.readouterr().out
    assert tracker.writers[0].process.returncode is not None


def test_points_of_a_stage_that_is_killed_are_written(project: Project) -> None:
    """`kill -9` closes the pipe, which is all that the writer waits for."""
    code = """
import os, signal
from tests.test_tracking import make_job
from tasks.common.training import tracking
with tracking.opened(make_job("dvclive", every=1)) as tracker:
    for step in range(1, 4):
        tracker.log(step, {"loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    path = project.path / "runs/run-1/tracking/pretrain@clm/dvclive/metrics.json"
    until = time.monotonic() + 60
    while not (path.exists() and '"step": 3' in path.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    assert json.loads(path.read_text())["step"] == 3


def test_of_several_processes_the_first_one_writes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    job = make_job("dvclive")
    with tracking.opened(job) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert not job.run_folder.exists()


# Settings


def problem(to: list[str]) -> str:
    """Return what is told of a choice of services."""
    params = read_params(ROOT / "profiles/default.yaml")
    params["placement"]["tracking"]["to"] = to
    with pytest.raises(SettingsError) as failure:
        check(params)
    return str(failure.value).splitlines()[1].strip()


def test_an_unknown_service_is_told_with_those_there_are() -> None:
    found = problem(["tensorbord"])
    assert found.startswith("placement.tracking.to.0: found 'tensorbord'")
    assert all(repr(service) in found for service in get_args(Service))


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_service_that_is_not_installed_is_told_before_anything_runs(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == service else object())
    found = problem(["dvclive", service])
    assert f"{service} is not installed: `pip install -c requirements.lock -e '.[{service}]'` brings it" in found


def test_a_service_is_named_once() -> None:
    assert "each service should be named once" in problem(["dvclive", "dvclive"])


def test_what_is_to_be_installed_is_what_the_project_asks_for() -> None:
    """Each service is one of the project's own packages, or an extra of that name."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {re.split("[^a-z]", line)[0] for line in project["dependencies"]}
    assert set(get_args(Service)) <= own | set(project["optional-dependencies"])


# FLOPs


def counted(model: Any, **inputs: Any) -> int:
    """Return the FLOPs of a forward and backward pass as torch counts them, product by product."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(**inputs).logits.float().square().mean().backward()
    total: int = counter.get_total_flops()
    return total


def decoder(chain: Chain) -> Any:
    """Return a fresh decoder with the chain's vocabulary."""
    return models.new_decoder(SHAPE, chain.tokenizer(), 64, NUMERICS)


def test_flops_of_a_decoder_are_those_of_the_paper(chain: Chain) -> None:
    """6N + 12·L·H·Q·T by hand: 3 blocks of 4 x 64 x 64 and 3 x 64 x 96 weights, and the head's."""
    model = decoder(chain)
    weights = 3 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * model.config.vocab_size
    assert flops.per_token(model, 32) == 6 * weights + 12 * 3 * 4 * 16 * 32


@pytest.mark.parametrize(
    ("method", "gap"),
    [
        (None, 0.002),
        (Top(name="top", layers=1), 0.002),
        (Lora.model_validate(LORA), 0.03),
        (Adapter(name="adapter", width=4), 0.05),
    ],
    ids=["full", "top", "lora", "adapter"],
)
def test_flops_are_what_torch_counts(chain: Chain, method: Any, gap: float) -> None:
    """Of whole training, and where part of the weights is frozen.

    The formula leaves rotary positions out, and takes the first block's keys and values to hand a gradient on, which
    beneath low-rank matrices they need not: 2 of these 21 matrices. Beneath adapters the first block's attention
    scores need none either: 8·H·Q·T.
    """
    import torch

    model = decoder(chain)
    trained: Any = methods.apply(model, method) if method else model
    ids = torch.arange(2 * 48).view(2, 48) % 60
    expected = counted(trained, input_ids=ids, use_cache=False)
    assert flops.per_token(trained, 48) * ids.numel() == pytest.approx(expected, rel=gap)


def test_flops_of_layers_beneath_all_that_learns_are_one_pass(chain: Chain) -> None:
    """With nothing learning below, a frozen layer is neither given a gradient nor hands one on."""
    import torch

    model = decoder(chain)
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    ids = torch.arange(2 * 48).view(2, 48) % 60
    whole = 12 * 3 * 4 * 16 * 48  # of which the two frozen blocks do a third
    expected = counted(model, input_ids=ids, use_cache=False)
    assert (flops.per_token(model, 48) - whole * 2 / 3 * 2 / 3) * ids.numel() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_flops_of_an_encoder_count_its_head_where_it_is_asked(chain: Chain, share: float) -> None:
    """Masked pretraining works the vocabulary out at the masked places alone."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model: Any = models.new_encoder(SHAPE, chain.tokenizer(), 64, NUMERICS)
    ids = torch.arange(2 * 48).view(2, 48) % 60
    with FlopCounterMode(display=False) as counter:
        states = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        model.decoder(model.head(states[:, : int(48 * share)])).float().square().mean().backward()
    expected = counter.get_total_flops()
    assert flops.per_token(model, 48, read_out=share) * ids.numel() == pytest.approx(expected, rel=0.02)


def test_a_ceiling_is_measured_once_and_draws_no_numbers(chain: Chain) -> None:
    """torch's own generator goes on as if nothing had been, and the same question is not measured again."""
    import torch

    flops.ceiling.cache_clear()
    model = decoder(chain)
    state = torch.get_rng_state()
    work = Work.of(model, 32, NUMERICS)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < work.ceiling < 1e14
    assert Work.of(model, 64, NUMERICS).ceiling == work.ceiling
    assert flops.ceiling.cache_info().misses == 1
    bfloat16 = NUMERICS.model_copy(update={"dtype": Dtypes(decoder="bfloat16", encoder="float32")})
    Work.of(model, 32, bfloat16)
    assert flops.ceiling.cache_info().misses == 2


def test_utilisation_is_the_share_of_the_ceiling() -> None:
    """1,000 tokens of 2 MFLOPs in half a second are 4 GFLOP/s: two fifths of 10."""
    assert Work(flops_per_token=2e6, ceiling=1e10).utilisation(1000, 0.5) == pytest.approx(0.4)


@pytest.mark.parametrize("name", ["pretrain@clm", "pretrain@mlm", "finetune"])
def test_stages_say_how_well_they_use_the_machine(name: str, chain: Chain, tmp_path: Path) -> None:
    tiny = config(name, steps=3, batch=4)
    job = chain.job(name, tiny, tmp_path)
    chain.run(job, tiny)
    assert 0 < job.figures["mfu"] < 1.5
    assert job.figures["ceiling_gflops"] > 0.1


# Services that are installed on request


def test_weights_and_biases_offline(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's file lies in its folder, whole, and nothing was sent."""
    pytest.importorskip("wandb", reason="an extra of its own")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    job = make_job("wandb")
    fit(job)
    (file,) = (job.run_folder / "tracking/pretrain@clm/wandb").rglob("*.wandb")
    assert b"gradient_norm" in file.read_bytes()
    assert project.git("status", "--porcelain") == ""


@pytest.mark.filterwarnings("default")  # MLflow's affair, with the SQLAlchemy that it finds
def test_mlflow_in_a_database_of_its_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back with its client, after a resume: one run, every step."""
    mlflow = pytest.importorskip("mlflow", reason="an extra of its own")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(KeyboardInterrupt):
        fit(make_job("mlflow", every=1, seconds=1e-9), stop=6)
    job = make_job("mlflow", every=1)
    history, _ = fit(job)
    database = (job.run_folder / "tracking/pretrain@clm/mlflow/mlflow.db").resolve()
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name("bessemer").experiment_id])
    assert run.info.run_name == "run-1/pretrain@clm"
    found = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert found == pytest.approx({int(row["step"]): row["loss"] for row in history.rows}, abs=1e-5)
    assert project.git("status", "--porcelain") == ""
