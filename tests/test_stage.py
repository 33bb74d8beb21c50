"""The stage harness on an example stage, `cook`: outputs of complete, failed and interrupted runs."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tasks.common import identity
from tasks.common.code import stages
from tasks.common.harness import execution, job, launch, records
from tasks.common.settings import Parallel
from tests.conftest import ROOT
from tests.training_fixtures import NUMERICS

COOK = '''
"""A stage that writes a folder and a file, or fails, as its settings say."""
import sys, time
from pathlib import Path
from pydantic import Field
from tasks.common.harness import execution, job as harness_job
from tasks.common.settings import Settings

INPUTS = {"raw": "data/raw.txt"}
OUTPUTS = {"dish": "data/cook/dish", "smell": "data/cook/smell.txt"}
NUMERICS = False  # no model computes here, so Transformers is not imported

class Config(Settings):
    text: str = Field(description="What is written")
    way: str = Field(description="How it ends")

def run(config, job):
    job.outputs["dish"].mkdir()
    (job.outputs["dish"] / config.text).write_text(job.inputs["raw"].read_text() + config.text)
    if config.way == "hang":
        Path("ready").touch()
        time.sleep(600)
    if config.way == "full":
        raise OSError(28, "No space left on device")
    if config.way == "import":
        import a_package_of_the_lock
    if config.way == "refuse":
        raise harness_job.StageError("the pot is empty: fill data/raw.txt")
    if config.way != "forget":
        job.outputs["smell"].write_text("good")
    job.log_figures(tokens_per_second=7.5, folder=str(job.run_folder))
    return {"portions": 2}

if __name__ == "__main__":
    execution.check = lambda params, stages: None
    execution.main("cook")
'''
PARAMS = """
base: {seed: 1}
numerics: %s
placement:
  {max_parallel_stages: 1, cost_per_hour: 0, currency: USD, checkpoints: {url: checkpoints, every_seconds: 60},
   min_new_rankings: 1, tracking: {to: [], every: 1}}
cook: {text: soup, way: well}
"""


class Kitchen:
    """A folder with the stage `cook` in it."""

    def __init__(self, path: Path) -> None:
        from tasks.common.defaults import read_settings

        numerics = read_settings(ROOT / "profiles" / "default.yaml")["numerics"]
        self.path = path
        (path / "data").mkdir(parents=True)
        (path / "data" / "raw.txt").write_text("raw ")
        (path / "requirements.lock").write_text("pot==1\n")
        (path / "cook.py").write_text(COOK)
        (path / "params.yaml").write_text(PARAMS % json.dumps(numerics))

    def set(self, **values: str) -> None:
        """Change the stage's settings."""
        settings = {"text": "soup", "way": "well"} | values
        lines = (self.path / "params.yaml").read_text().splitlines()
        lines[-1] = f"cook: {json.dumps(settings)}"
        (self.path / "params.yaml").write_text("\n".join(lines))

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start the stage as DVC would."""
        return subprocess.Popen(
            [sys.executable, "cook.py", *arguments],
            cwd=self.path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **env: str) -> tuple[int, str]:
        """Run the stage to completion; return exit code and output."""
        process = self.start(*arguments, **env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def json(self, name: str) -> Any:
        """Read a JSON file of the folder."""
        return json.loads((self.path / name).read_text())

    def tracked(self) -> dict[str, bytes]:
        """Return every file that DVC would track, with its bytes."""
        files = [path for name in ("data/cook", "metrics") for path in (self.path / name).rglob("*") if path.is_file()]
        return {path.relative_to(self.path).as_posix(): path.read_bytes() for path in files}

    def scratch(self) -> list[Path]:
        """Return the contents of the scratch folder."""
        return list((self.path / "data" / ".scratch").glob("*"))


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path / "kitchen")


def hang(kitchen: Kitchen) -> subprocess.Popen[str]:
    """Start the stage and wait until it has written half of its outputs."""
    kitchen.set(text="stew", way="hang")
    process = kitchen.start()
    for _ in range(600):
        if (kitchen.path / "ready").exists():
            return process
        time.sleep(0.1)
    process.kill()
    pytest.fail(process.communicate()[0])


class TestComplete:
    def test_stage_writes_outputs_record_metrics_and_log(self, kitchen: Kitchen) -> None:
        code, output = kitchen.run(BESSEMER_RUN_ID="run-1")
        assert code == 0, output
        assert sorted(kitchen.tracked()) == [
            "data/cook/dish/soup", "data/cook/record.json", "data/cook/smell.txt", "metrics/cook.json",
        ]  # fmt: skip
        assert kitchen.json("metrics/cook.json") == {"portions": 2}
        record = kitchen.json("data/cook/record.json")
        assert record["stage"] == "cook"
        assert record["settings"] == {"text": "soup", "way": "well"}
        computed = stages.digest_module("cook", kitchen.path)
        assert record["code"] == {"digest": stages.digest_code(computed), "detail": "data/code/cook.json"}
        assert "run" in computed["cook.py"]
        assert record["inputs"] == {"data/raw.txt": identity.tree_hash(kitchen.path / "data" / "raw.txt")}
        dish = identity.tree_hash(kitchen.path / "data" / "cook" / "dish")
        assert record["outputs"]["data/cook/dish"] == dish
        assert record["content"] == identity.hash_json(record["outputs"])
        assert kitchen.scratch() == []
        log = kitchen.json("runs/run-1/cook.json")
        assert log["tokens_per_second"] == 7.5
        assert log["folder"] == "runs/run-1"  # where the stage's live curves go too
        assert log["recipe"] == record["recipe"]
        assert {"seconds", "peak_memory_bytes", "host", "commit", "dirty", "started"} <= set(log)

    def test_tracked_bytes_are_the_same_in_another_folder_at_another_time(
        self, kitchen: Kitchen, tmp_path: Path
    ) -> None:
        other = Kitchen(tmp_path / "elsewhere" / "kitchen")
        assert kitchen.run(BESSEMER_RUN_ID="run-1")[0] == other.run(BESSEMER_RUN_ID="run-2")[0] == 0
        assert kitchen.tracked() == other.tracked()

    def test_settings_inputs_code_and_lock_change_the_recipe(self, kitchen: Kitchen) -> None:
        recipes = []
        for change, more in (
            ("params.yaml", ""),
            ("data/raw.txt", "x"),
            ("cook.py", "SPOONS = 1\n"),
            ("requirements.lock", "pan==2"),
            ("", ""),
        ):
            kitchen.run()
            recipes.append(kitchen.json("data/cook/record.json")["recipe"])
            if change:
                old = (kitchen.path / change).read_text()
                (kitchen.path / change).write_text(old.replace("soup", "stew") + more)
        assert len(set(recipes)) == len(recipes)

    def test_placement_does_not_change_the_recipe(self, kitchen: Kitchen) -> None:
        kitchen.run()
        before = kitchen.tracked()
        path = kitchen.path / "params.yaml"
        more = "max_parallel_stages: 8, activation_checkpointing: true, timeouts: {vllm_seconds: 1}, timed_tokens: 8"
        path.write_text(path.read_text().replace("max_parallel_stages: 1", more).replace("USD", "EUR"))
        kitchen.run()
        assert kitchen.tracked() == before

    def test_new_result_replaces_the_old_one(self, kitchen: Kitchen) -> None:
        kitchen.run()
        kitchen.set(text="stew")
        assert kitchen.run()[0] == 0
        assert [path.name for path in (kitchen.path / "data" / "cook" / "dish").iterdir()] == ["stew"]


class TestInterrupted:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
    def test_interrupted_stage_keeps_the_old_result(self, kitchen: Kitchen, number: signal.Signals, code: int) -> None:
        kitchen.run()
        before = kitchen.tracked()
        process = hang(kitchen)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in output
        assert kitchen.tracked() == before

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_interrupted_first_run_leaves_no_result_and_the_next_run_completes(
        self, kitchen: Kitchen, number: signal.Signals
    ) -> None:
        process = hang(kitchen)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert kitchen.tracked() == {}
        kitchen.set(way="well")
        assert kitchen.run()[0] == 0
        assert kitchen.scratch() == []

    def test_second_run_names_the_running_process(self, kitchen: Kitchen) -> None:
        """The first run's `dvc repro` may have been killed, so that DVC no longer knows of it."""
        first = hang(kitchen)
        code, output = kitchen.run()
        assert code == 1
        assert output.startswith(f"cook: process {first.pid} is already running this stage in this folder")
        assert f"`kill {first.pid}`" in output
        assert first.poll() is None
        assert kitchen.scratch() != []  # the first one's, untouched
        first.kill()
        first.communicate(timeout=60)
        kitchen.set(way="well")
        assert kitchen.run()[0] == 0

    @pytest.mark.parametrize("step", range(4))
    def test_crash_while_moving_results_leaves_no_record(
        self, kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        """After a crash at any rename, an existing record matches the outputs beside it."""
        kitchen.run()
        kitchen.set(text="stew")
        calls = iter(range(9))
        rename = Path.replace

        def replace(self: Path, target: Path) -> Path:
            if next(calls) == step:
                raise RuntimeError("the machine is gone")
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        with CookModule(kitchen, monkeypatch) as cook, pytest.raises(RuntimeError, match="the machine is gone"):
            execution.execute(cook, None)
        record = kitchen.path / "data" / "cook" / "record.json"
        if record.exists():
            for path, digest in json.loads(record.read_text())["outputs"].items():
                assert identity.tree_hash(kitchen.path / path) == digest


def test_stages_side_by_side_keep_their_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate@encoder` starts and ends while `evaluate@encoder-int8` writes, and leaves its scratch folder alone."""
    monkeypatch.chdir(tmp_path)
    with execution._scratch("evaluate@encoder-int8", {"answers": Path("data/a")}) as longer:
        longer["answers"].write_text("half")
        with execution._scratch("evaluate@encoder", {"answers": Path("data/b")}) as shorter:
            shorter["answers"].write_text("half")
        assert longer["answers"].read_text() == "half"
    assert list(execution.SCRATCH_FOLDER.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "processes", "expected"),
    [
        ({}, 3, r"3 processes .* has 2 cores available, .*processes to 2 or less, or start torchrun on several"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3"}, 4, "3 processes .* 2 cores"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 4, "2 processes were started, but numerics.parallel.processes is 4"),
    ],
)
def test_each_process_gets_its_own_device(
    variables: dict[str, str], processes: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked before anything is loaded; with several machines, only this machine's processes count."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    trains = ModuleType("tasks.trains")
    trains.PARALLEL = True  # type: ignore[attr-defined]
    numerics = NUMERICS.model_copy(update={"parallel": Parallel(processes=processes, engine="data")})
    with pytest.raises(job.StageError, match=expected) if expected else nullcontext():
        launch.launch_processes(trains, None, numerics)


def test_run_outputs_do_not_make_a_checkout_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    assert records.commit(tmp_path) == {"commit": None, "dirty": None}
    for name in ("code.py", "dvc.lock", "metrics/cook.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    for name in ("dvc.lock", "metrics/cook.json", "metrics/new.json"):
        (tmp_path / name).write_text("after")
    assert records.commit(tmp_path)["dirty"] is False
    (tmp_path / "code.py").write_text("after")
    assert records.commit(tmp_path)["dirty"] is True


class TestFailed:
    @pytest.mark.parametrize(
        ("failure", "words"),
        [
            ("refuse", "cook: the pot is empty: fill data/raw.txt"),
            ("full", "cook: the disk is full"),
            ("import", f"{sys.executable} has no package a_package_of_the_lock: activate the project's environment"),
        ],
    )
    def test_user_error_is_printed_without_traceback(self, kitchen: Kitchen, failure: str, words: str) -> None:
        kitchen.set(way=failure)
        code, output = kitchen.run()
        assert code == 1
        assert output.startswith(words)
        assert "Traceback" not in output
        assert kitchen.tracked() == {}
        assert kitchen.scratch() == []

    def test_full_disk_error_names_free_space_and_remedy(self, kitchen: Kitchen) -> None:
        kitchen.set(way="full")
        output = kitchen.run()[1]
        assert "MB free" in output
        assert "dvc gc" in output
        assert errno.ENOSPC == 28

    def test_missing_output_is_an_error(self, kitchen: Kitchen) -> None:
        kitchen.set(way="forget")
        code, output = kitchen.run()
        assert code == 1
        assert "the stage did not write data/cook/smell.txt" in output
        assert not (kitchen.path / "data" / "cook" / "record.json").exists()

    def test_a_missing_input_is_named(self, kitchen: Kitchen) -> None:
        (kitchen.path / "data" / "raw.txt").unlink()
        code, output = kitchen.run()
        assert code == 1
        assert "cook: data/raw.txt is missing" in output

    def test_unknown_entry_is_rejected(self, kitchen: Kitchen) -> None:
        code, output = kitchen.run("clm")
        assert code == 1
        assert output.startswith("usage: python -m cook")


class CookModule:
    """The stage `cook` as a module of this process, its folder the current one."""

    def __init__(self, kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kitchen, self.monkeypatch = kitchen, monkeypatch

    def __enter__(self) -> ModuleType:
        self.monkeypatch.chdir(self.kitchen.path)
        self.monkeypatch.syspath_prepend(self.kitchen.path)
        self.monkeypatch.setattr(execution, "check", lambda params, stages: None)
        return importlib.import_module("cook")

    def __exit__(self, *exception: object) -> None:
        sys.modules.pop("cook", None)
