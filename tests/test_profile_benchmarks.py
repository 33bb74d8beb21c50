"""The benchmarks of the GPU profiles, without a GPU: what they run, and the rows that they make of a run's logs."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_profile, machine, multi_gpu_profile, profile_run
from benchmarks.harness import BenchmarkError
from benchmarks.pipeline import CompleteRun
from benchmarks.profile_twin import make_twin, read_profile, write_params
from tasks.common.raw_params import read_params


@pytest.mark.parametrize(("benchmark", "gpus"), [(gpu_profile, 0), (multi_gpu_profile, 0), (multi_gpu_profile, 1)])
def test_measure_with_too_few_gpus_says_what_is_needed(
    benchmark: Any, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    with pytest.raises(BenchmarkError, match=rf"needs {benchmark.MIN_GPUS} GPU.*torch finds {gpus}.*--trial"):
        benchmark.measure(trial=False)


@pytest.mark.parametrize(
    ("benchmark", "gpus", "trial", "numerics"),
    [
        (gpu_profile, 4, False, {"device": "cuda"}),
        (multi_gpu_profile, 2, False, {"device": "cuda", "parallel": {"processes": 2, "engine": "data"}}),
        (multi_gpu_profile, 7, False, {"device": "cuda", "parallel": {"processes": 4, "engine": "data"}}),
        (gpu_profile, 0, True, {"device": "cpu"}),
        (multi_gpu_profile, 1, True, {"device": "cpu", "parallel": {"processes": 2, "engine": "data"}}),
    ],
)
def test_measure_runs_the_profile_on_the_gpus_that_there_are(
    benchmark: Any, gpus: int, trial: bool, numerics: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    def stop(folder: Path, params: dict[str, Any]) -> Path:
        made.append(params)
        raise BenchmarkError("stopped")

    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    monkeypatch.setattr(profile_run, "create", stop)
    with pytest.raises(BenchmarkError, match="stopped"):
        benchmark.measure(trial=trial)
    [params] = made
    assert {name: params["numerics"].get(name) for name in numerics} == numerics
    assert params["package"]["refuse_failed_gates"] is False  # a failed gate is a row of the record
    profile = read_profile(benchmark.PROFILE)
    assert params["pretrain"] == (make_twin(profile) if trial else profile)["pretrain"]


def test_rows_are_those_of_the_logs_and_the_scorecard(tmp_path: Path) -> None:
    common = {"started": "2026-01-01T12:00:10+00:00", "commit": "c", "dirty": False}
    trained = {"stage": "pretrain@causal", "seconds": 110.0, "peak_memory_bytes": 3e9, "tokens_per_second": 390000,
               "mfu": 0.4, **common}  # fmt: skip
    packed = {"stage": "package", "seconds": 2.0, "peak_memory_bytes": 1e9, **common,
              "started": "2026-01-01T12:03:00+00:00"}  # fmt: skip
    whole = CompleteRun("run-20260101-120000-aaaa", [packed, trained], {"build": {"seconds": 8.0}})
    tracked = tmp_path / "runs" / whole.name / "tracking/pretrain@causal/dvclive/metrics.json"
    tracked.parent.mkdir(parents=True)
    tracked.write_text(json.dumps({"peak_memory_bytes": 16e9}), encoding="utf-8")
    scorecard = {"models": [{"model": "chat", "parameters": 7, "exact_match_seen": 0.97, "bits_per_byte": None}],
                 "gates": [{"passed": True}, {"passed": False}]}  # fmt: skip
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/evaluate.json").write_text(json.dumps(scorecard), encoding="utf-8")
    rows = [
        *profile_run.run_rows(whole),
        *profile_run.training_rows(whole, tmp_path),
        *profile_run.quality_rows(tmp_path),
    ]
    assert {row.what: row.ours for row in rows} == {
        "text to endpoint: the chain from nothing, and the build": 190.0,
        "time, pretrain@causal": 110.0, "time, package": 2.0, "peak memory of stages at the same time": 3.0,
        "training speed, pretrain@causal": 390000, "model FLOPs utilisation, pretrain@causal": 0.4,
        "peak memory of a process on its device, pretrain@causal": 16.0,
        "parameters, chat": 7, "exact_match_seen, chat": 0.97, "gates failed": 1,
    }  # fmt: skip
    assert [row.met for row in rows if row.target] == [True, False]


def test_project_of_a_run_has_code_data_settings_and_a_commit(tmp_path: Path) -> None:
    params = make_twin(read_profile("gpu"))
    project = profile_run.create(tmp_path / "project", params)
    assert read_params(project / "params.yaml") == params
    assert all((project / name).exists() for name in ("tasks", "dvc.yaml", "data/sources/wordings.yaml", ".git"))


def test_written_settings_are_read_as_they_were(tmp_path: Path) -> None:
    write_params(tmp_path / "params.yaml", read_profile("multi-gpu"))
    assert read_params(tmp_path / "params.yaml") == read_profile("multi-gpu")
