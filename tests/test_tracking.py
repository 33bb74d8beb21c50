"""Live curves, read back with each service's own library, and model FLOPs against torch's FLOP counter."""

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

from tasks.common.defaults import read_settings
from tasks.common.harness.job import Job
from tasks.common.modelling import methods, models
from tasks.common.modelling.methods import Adapter, Lora, TopLayers
from tasks.common.modelling.models import Shape
from tasks.common.params_file import check
from tasks.common.settings import Checkpoints, Dtypes, Service, SettingsError, Tracking
from tasks.common.training import flops, tracking
from tasks.common.training.flops import MfuEstimator
from tasks.common.training.loop import History, train
from tests.conftest import ROOT, Project
from tests.test_training import Toy, settings
from tests.training_fixtures import LORA, NUMERICS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

SHAPE = Shape(hidden=64, layers=3, heads=4, feed_forward=96)
STEPS = 10


@pytest.fixture
def project(toy: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project under git and DVC as the working directory."""
    monkeypatch.chdir(toy.path)
    monkeypatch.setattr(tracking, "ABORT_TIMEOUT_S", 60.0)  # on a busy machine a second's work takes ten
    return toy


def make_job(*to: Service, run: str = "run-1", every: int = 2, seconds: float = 1e9) -> Job:
    """Return a job that logs to these services."""
    return Job(
        "pretrain", "causal", {}, {}, 1, NUMERICS, "r", Checkpoints(url="checkpoints", every_seconds=seconds),
        Tracking(to=list(to), every=every), Path("runs", run),
    )  # fmt: skip


def fit(
    job: Job, stop: int | None = None, mfu_estimator: MfuEstimator | None = None
) -> tuple[History, list[list[float]]]:
    """Train the toy regression, optionally interrupted before step `stop`; return its history and weights."""
    toy = Toy()
    toy.stop_at = stop
    _, history = train(toy.model, toy, settings(steps=STEPS), job, mfu_estimator)
    return history, toy.values()


def dvclive_curve(job: Job, name: str) -> dict[int, float]:
    """Return one of DVCLive's curves, step to value; fail on duplicate steps."""
    with (job.run_folder / f"tracking/pretrain@causal/dvclive/plots/metrics/{name}.tsv").open() as file:
        rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file, delimiter="\t")]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def tensorboard_curve(job: Job, name: str) -> dict[int, float]:
    """Return one of TensorBoard's curves, read with TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job.run_folder / "tracking/pretrain@causal/tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


# Curves


METRICS = {
    "loss", "error_loss", "size_loss", "gradient_norm", "learning_rate", "tokens_per_second", "mfu",
    "peak_memory_bytes",
}  # fmt: skip


def test_curves_are_those_of_the_training(project: Project) -> None:
    """Every second step, both services have the numbers of the stage's own curve, and all metrics."""
    job = make_job("dvclive", "tensorboard")
    history, _ = fit(job, mfu_estimator=MfuEstimator(flops_per_token=100.0, peak_flops=1e9))
    losses = {int(row["step"]): row["loss"] for row in history.rows}
    expected = {step: losses[step] for step in (2, 4, 6, 8, 10)}
    assert dvclive_curve(job, "loss") == pytest.approx(expected, abs=1e-5)
    assert tensorboard_curve(job, "loss") == pytest.approx(expected, abs=1e-5)
    last = json.loads((job.run_folder / "tracking/pretrain@causal/dvclive/metrics.json").read_text())
    assert set(last) == METRICS | {"step"}
    assert last["step"] == STEPS
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * 100 / 1e9)
    assert last["peak_memory_bytes"] > 50e6
    assert set(tensorboard_curve(job, "mfu")) == set(expected)


def test_only_the_run_folder_is_written(project: Project) -> None:
    """Nothing that git or DVC tracks changes, and no DVC experiment is created."""
    before = project.git("for-each-ref"), (project.path / "dvc.yaml").read_bytes()
    fit(make_job("dvclive", "tensorboard"))
    assert project.git("status", "--porcelain") == ""
    assert (project.git("for-each-ref"), (project.path / "dvc.yaml").read_bytes()) == before
    folders = {path.parts[0] for path in (path.relative_to(project.path) for path in project.path.rglob("tracking"))}
    assert folders == {"runs"}


def test_tracking_does_not_change_the_result(project: Project) -> None:
    untracked, tracked = make_job(run="a"), make_job("dvclive", "tensorboard", run="b")
    first, second = fit(untracked), fit(tracked)
    assert (first[0].rows, first[1]) == (second[0].rows, second[1])
    assert not (untracked.run_folder / "tracking").exists()


def test_the_last_step_is_never_missing(project: Project) -> None:
    """Also if a curve is shorter than the logging interval."""
    job = make_job("dvclive", every=7)
    fit(job)
    assert set(dvclive_curve(job, "loss")) == {7, 10}


def test_speed_is_measured_since_last_point(project: Project) -> None:
    """A slow phase shows at its steps; the job's measurements have the MFU of the whole run."""
    job = make_job("dvclive", every=1)
    with tracking.open_tracker(job, mfu_estimator=MfuEstimator(flops_per_token=10.0, peak_flops=1e5)) as tracker:
        for step, seconds in enumerate([1.0, 4.0, 1.0], 1):
            tracker.started -= seconds  # as if that much more time had passed
            tracker.last_logged = time.perf_counter() - seconds
            tracker.log(step, {"loss": 1.0}, tokens=100)
    speeds = dvclive_curve(job, "tokens_per_second")
    assert list(speeds.values()) == pytest.approx([100.0, 25.0, 100.0], rel=0.2)
    assert job.figures["mfu"] == pytest.approx(300 * 10 / 6.0 / 1e5, rel=0.2)


def test_ppo_is_tracked(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One point per iteration, whatever the logging interval."""
    chain.path("data/reward/train/model")
    tiny = config("align@policy", iterations=2)
    job = chain.job(
        "align@policy", tiny, tmp_path, tracking=Tracking(to=["tensorboard"], every=100), run_folder=tmp_path / "r"
    )
    chain.run(job, tiny)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "r/tracking" / job.name / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3]
    assert {"kl", "gradient_norm", "learning_rate", "tokens_per_second"} <= set(events.Tags()["scalars"])


# Resuming


@pytest.mark.parametrize("stop", [5, 7])
def test_resumed_run_continues_its_own_folder(project: Project, stop: int) -> None:
    """Every step is there once, also those logged after the last checkpoint and repeated."""
    job, whole = make_job("dvclive", "tensorboard", every=1), make_job("dvclive", run="whole", every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(make_job("dvclive", "tensorboard", every=1, seconds=1e-9), stop=4)
    for path in (project.path / "checkpoints").rglob("*"):
        assert "000000005" not in path.name
    with tracking.open_tracker(job, first_step=4) as tracker:
        # more steps are logged before a kill without another checkpoint
        for step in range(5, stop + 1):
            tracker.log(step, {"loss": -1.0})
    fit(job)
    assert job.figures["resumed_at_step"] == 4
    expected = {int(row["step"]): row["loss"] for row in fit(whole)[0].rows}
    assert dvclive_curve(job, "loss") == pytest.approx(expected, abs=1e-5)
    assert tensorboard_curve(job, "loss") == pytest.approx(expected, abs=1e-5)


def test_run_resumed_in_new_folder_copies_its_curve(project: Project) -> None:
    """In another run's folder, or on another worker, curves start with the checkpoint's rows."""
    with pytest.raises(KeyboardInterrupt):
        fit(make_job("dvclive", run="killed", every=1, seconds=1e-9), stop=6)
    job = make_job("dvclive", "tensorboard", run="next", every=1)
    history, _ = fit(job)
    expected = {int(row["step"]): row["loss"] for row in history.rows}
    assert set(expected) == set(range(1, STEPS + 1))
    assert dvclive_curve(job, "loss") == pytest.approx(expected, abs=1e-5)
    assert tensorboard_curve(job, "gradient_norm").keys() == expected.keys()
    assert set(dvclive_curve(job, "tokens_per_second")) == {7, 8, 9, 10}


def test_restarted_run_discards_old_curve(project: Project) -> None:
    """Without a checkpoint, the curves of the first attempt are deleted."""
    job = make_job("dvclive", "tensorboard", every=1)
    with tracking.open_tracker(job) as tracker:
        for step in range(1, 30):
            tracker.log(step, {"loss": -1.0})
    fit(job)
    assert set(dvclive_curve(job, "loss")) == set(tensorboard_curve(job, "loss")) == set(range(1, STEPS + 1))


# Failures


def test_failing_service_does_not_end_training(
    project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is reported once; the other service and the training continue."""
    broken = project.path / "runs" / "broken"
    broken.mkdir(parents=True)
    (broken / "tensorboard.py").write_text("raise OSError('no route to host')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    job = make_job("tensorboard", "dvclive")
    history, _ = fit(job)
    output = capfd.readouterr().err  # the progress bar may be on the message's line
    assert output.count("live logging") == 1
    assert "live logging to tensorboard has failed (no route to host); the stage continues without it" in output
    assert len(history.rows) == STEPS
    assert set(dvclive_curve(job, "loss")) == {2, 4, 6, 8, 10}


@pytest.mark.parametrize("points", [1, 5000])
def test_hanging_service_does_not_block_training(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], points: int
) -> None:
    """Not with a full pipe during training, and not beyond the timeout at the end."""
    (project.path / "hangs.py").write_text("import time; time.sleep(600)")  # longer than the test's timeout
    monkeypatch.setattr(tracking, "WRITER_SCRIPT", project.path / "hangs.py")
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.2)
    with tracking.open_tracker(make_job("tensorboard", every=1)) as tracker:
        for step in range(1, points + 1):
            tracker.log(step, {"loss": 1.0})
    assert "tensorboard did not finish in time; its last points may be missing" in capsys.readouterr().out
    assert tracker.writers[0].process.returncode is not None


def test_points_of_a_stage_that_is_killed_are_written(project: Project) -> None:
    """`kill -9` closes the pipe, after which the writer finishes."""
    code = """
import os, signal
from tests.test_tracking import make_job
from tasks.common.training import tracking
with tracking.open_tracker(make_job("dvclive", every=1)) as tracker:
    for step in range(1, 4):
        tracker.log(step, {"loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    path = project.path / "runs/run-1/tracking/pretrain@causal/dvclive/metrics.json"
    until = time.monotonic() + 60
    while not (path.exists() and '"step": 3' in path.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    assert json.loads(path.read_text())["step"] == 3


def test_only_rank_0_logs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    job = make_job("dvclive")
    with tracking.open_tracker(job) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert not job.run_folder.exists()


# Settings


def problem(to: list[str]) -> str:
    """Return the error message for a choice of services."""
    params = read_settings(ROOT / "profiles/default.yaml")
    params["placement"]["tracking"]["to"] = to
    with pytest.raises(SettingsError) as failure:
        check(params)
    return str(failure.value).splitlines()[1].strip()


def test_unknown_service_lists_choices() -> None:
    message = problem(["tensorbord"])
    assert message.startswith("placement.tracking.to.0: found 'tensorbord'")
    assert all(repr(service) in message for service in get_args(Service))


@pytest.mark.parametrize(("service", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_missing_service_package_is_reported_first(
    service: Service, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == service else object())
    message = problem(["dvclive", service])
    assert f"{service} is not installed: install it with `pip install -c requirements.lock {package}`" in message


def test_a_service_is_named_once() -> None:
    assert "each service should be named once" in problem(["dvclive", "dvclive"])


def test_services_are_dependencies_or_extras() -> None:
    """Each service is a dependency of the project, or an extra of that name."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {re.split("[^a-z]", line)[0] for line in project["dependencies"]}
    assert set(get_args(Service)) <= own | set(project["optional-dependencies"])


# FLOPs


def count_flops(model: Any, **inputs: Any) -> int:
    """Return the FLOPs of a forward and backward pass by torch's FLOP counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(**inputs).logits.float().square().mean().backward()
    total: int = counter.get_total_flops()
    return total


def decoder(chain: Chain) -> Any:
    """Return a newly initialized decoder with the chain's vocabulary."""
    return models.new_decoder(SHAPE, chain.tokenizer(), 64, NUMERICS)


def test_flops_of_a_decoder_are_those_of_the_paper(chain: Chain) -> None:
    """6N + 12·L·H·Q·T by hand: 3 blocks of 4 x 64 x 64 and 3 x 64 x 96 weights, and the head's."""
    model = decoder(chain)
    weights = 3 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * model.config.vocab_size
    assert flops.flops_per_token(model, 32) == 6 * weights + 12 * 3 * 4 * 16 * 32


@pytest.mark.parametrize(
    ("method", "gap"),
    [
        (None, 0.002),
        (TopLayers(name="top_layers", layers=1), 0.002),
        (Lora.model_validate(LORA), 0.03),
        (Adapter(name="adapter", width=4), 0.05),
    ],
    ids=["full", "top", "lora", "adapter"],
)
def test_flops_are_what_torch_counts(chain: Chain, method: Any, gap: float) -> None:
    """For full training, and with part of the weights frozen.

    The formula ignores rotary positions. It assumes that the first block's keys and values propagate gradients, which
    low-rank updates do not need: 2 of these 21 matrices. With adapters the first block's attention scores need no
    gradients either: 8·H·Q·T.
    """
    import torch

    model = decoder(chain)
    trained: Any = methods.apply(model, method) if method else model
    ids = torch.arange(2 * 48).view(2, 48) % 60
    expected = count_flops(trained, input_ids=ids, use_cache=False)
    assert flops.flops_per_token(trained, 48) * ids.numel() == pytest.approx(expected, rel=gap)


def test_flops_of_frozen_lower_layers_are_forward_only(chain: Chain) -> None:
    """A frozen layer above frozen layers computes no weight gradient and no input gradient."""
    import torch

    model = decoder(chain)
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    ids = torch.arange(2 * 48).view(2, 48) % 60
    whole = 12 * 3 * 4 * 16 * 48  # of which the two frozen blocks need a third
    expected = count_flops(model, input_ids=ids, use_cache=False)
    assert (flops.flops_per_token(model, 48) - whole * 2 / 3 * 2 / 3) * ids.numel() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_flops_of_encoder_use_head_share(chain: Chain, share: float) -> None:
    """Masked pretraining computes the head at masked positions only."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model: Any = models.new_encoder(SHAPE, chain.tokenizer(), 64, NUMERICS)
    ids = torch.arange(2 * 48).view(2, 48) % 60
    with FlopCounterMode(display=False) as counter:
        states = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        model.decoder(model.head(states[:, : int(48 * share)])).float().square().mean().backward()
    expected = counter.get_total_flops()
    assert flops.flops_per_token(model, 48, head_share=share) * ids.numel() == pytest.approx(expected, rel=0.02)


def test_peak_flops_is_cached_and_leaves_rng_unchanged(chain: Chain) -> None:
    """torch's global generator does not advance, and the same arguments are measured only once."""
    import torch

    flops.measure_peak_flops.cache_clear()
    model = decoder(chain)
    state = torch.get_rng_state()
    estimator = MfuEstimator.for_model(model, 32, NUMERICS)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < estimator.peak_flops < 1e14
    assert MfuEstimator.for_model(model, 64, NUMERICS).peak_flops == estimator.peak_flops
    assert flops.measure_peak_flops.cache_info().misses == 1
    bfloat16 = NUMERICS.model_copy(update={"dtype": Dtypes(decoder="bfloat16", encoder="float32")})
    MfuEstimator.for_model(model, 32, bfloat16)
    assert flops.measure_peak_flops.cache_info().misses == 2


def test_utilisation_is_fraction_of_peak() -> None:
    """1,000 tokens of 2 MFLOPs in 0.5 s are 4 GFLOP/s: 0.4 of 10 GFLOP/s."""
    assert MfuEstimator(flops_per_token=2e6, peak_flops=1e10).utilisation(1000, 0.5) == pytest.approx(0.4)


@pytest.mark.parametrize("name", ["pretrain@causal", "pretrain@masked", "finetune@chat"])
def test_stages_report_mfu(name: str, chain: Chain, tmp_path: Path) -> None:
    tiny = config(name, steps=3, batch=4)
    job = chain.job(name, tiny, tmp_path)
    chain.run(job, tiny)
    assert 0 < job.figures["mfu"] < 1.5
    assert job.figures["peak_gflops"] > 0.1


# Services that are installed on request


def test_weights_and_biases_offline(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's file is complete, and nothing was sent."""
    pytest.importorskip("wandb", reason="an extra of its own")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    job = make_job("wandb")
    fit(job)
    (file,) = (job.run_folder / "tracking/pretrain@causal/wandb").rglob("*.wandb")
    assert b"gradient_norm" in file.read_bytes()
    assert project.git("status", "--porcelain") == ""


@pytest.mark.filterwarnings("default")  # MLflow triggers warnings of SQLAlchemy
def test_mlflow_in_a_database_of_its_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume there is one run with every step."""
    mlflow = pytest.importorskip("mlflow", reason="an extra of its own")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(KeyboardInterrupt):
        fit(make_job("mlflow", every=1, seconds=1e-9), stop=6)
    job = make_job("mlflow", every=1)
    history, _ = fit(job)
    database = (job.run_folder / "tracking/pretrain@causal/mlflow/mlflow.db").resolve()
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name("bessemer").experiment_id])
    assert run.info.run_name == "run-1/pretrain@causal"
    values = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert values == pytest.approx({int(row["step"]): row["loss"] for row in history.rows}, abs=1e-5)
    assert project.git("status", "--porcelain") == ""
