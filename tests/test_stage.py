"""The harness on a stage of its own, `cook`: what a complete run leaves, and what no end of a run may leave."""

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

from tasks.common import identity, stage
from tasks.common.settings import Parallel
from tests.conftest import ROOT
from tests.training_fixtures import NUMERICS

COOK = '''
"""A stage that writes a folder and a file, in the way that its settings ask for."""
import sys, time
from pathlib import Path
from pydantic import Field
from tasks.common import stage
from tasks.common.settings import Settings

INPUTS = {"raw": "data/raw.txt"}
OUTPUTS = {"dish": "data/cook/dish", "smell": "data/cook/smell.txt"}

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
    if config.way == "refuse":
        raise stage.StageError("the pot is empty: fill data/raw.txt")
    if config.way != "forget":
        job.outputs["smell"].write_text("good")
    job.measured(tokens_per_second=7.5, folder=str(job.run_folder))
    return {"portions": 2}

if __name__ == "__main__":
    stage.check = lambda params, stages: None
    stage.main("cook")
'''
PARAMS = """
base: {seed: 1}
numerics: %s
placement:
  {side_by_side: 1, cost_per_hour: 0, currency: USD, checkpoints: {url: checkpoints, every_seconds: 60},
   enough_rankings: 1, tracking: {to: [], every: 1}}
cook: {text: soup, way: well}
"""


class Kitchen:
    """A folder with the stage `cook` in it."""

    def __init__(self, path: Path) -> None:
        from tasks.common.settings import read_params

        numerics = read_params(ROOT / "profiles" / "default.yaml")["numerics"]
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
        """Run the stage to its end; return exit code and output."""
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
        """Return what lies in the scratch folder."""
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
    def test_outputs_record_metrics_and_log_are_left(self, kitchen: Kitchen) -> None:
        code, output = kitchen.run(BESSEMER_RUN_ID="run-1")
        assert code == 0, output
        assert sorted(kitchen.tracked()) == [
            "data/cook/dish/soup", "data/cook/record.json", "data/cook/smell.txt", "metrics/cook.json",
        ]  # fmt: skip
        assert kitchen.json("metrics/cook.json") == {"portions": 2}
        record = kitchen.json("data/cook/record.json")
        assert record["stage"] == "cook"
        assert record["settings"] == {"text": "soup", "way": "well"}
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
            ("cook.py", "#"),
            ("requirements.lock", "pan==2"),
            ("", ""),
        ):
            kitchen.run()
            recipes.append(kitchen.json("data/cook/record.json")["recipe"])
            if change:
                old = (kitchen.path / change).read_text()
                (kitchen.path / change).write_text(old.replace("soup", "stew") + more)
        assert len(set(recipes)) == len(recipes)

    def test_placement_is_no_part_of_it(self, kitchen: Kitchen) -> None:
        kitchen.run()
        before = kitchen.tracked()
        path = kitchen.path / "params.yaml"
        path.write_text(path.read_text().replace("side_by_side: 1", "side_by_side: 8").replace("USD", "EUR"))
        kitchen.run()
        assert kitchen.tracked() == before

    def test_a_new_result_replaces_the_old_one_whole(self, kitchen: Kitchen) -> None:
        kitchen.run()
        kitchen.set(text="stew")
        assert kitchen.run()[0] == 0
        assert [path.name for path in (kitchen.path / "data" / "cook" / "dish").iterdir()] == ["stew"]


class TestInterrupted:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
    def test_the_old_result_stays_whole(self, kitchen: Kitchen, number: signal.Signals, code: int) -> None:
        kitchen.run()
        before = kitchen.tracked()
        process = hang(kitchen)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in output
        assert kitchen.tracked() == before

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_the_first_result_is_none_and_the_next_run_clears_up(
        self, kitchen: Kitchen, number: signal.Signals
    ) -> None:
        process = hang(kitchen)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert kitchen.tracked() == {}
        kitchen.set(way="well")
        assert kitchen.run()[0] == 0
        assert kitchen.scratch() == []

    def test_a_second_run_is_told_of_the_first(self, kitchen: Kitchen) -> None:
        """Whose `dvc repro` may have been killed: DVC no longer knows of it."""
        first = hang(kitchen)
        code, said = kitchen.run()
        assert code == 1
        assert said.startswith(f"cook: process {first.pid} is at work on this stage here")
        assert f"`kill {first.pid}`" in said
        assert first.poll() is None
        assert kitchen.scratch() != []  # the first one's, untouched
        first.kill()
        first.communicate(timeout=60)
        kitchen.set(way="well")
        assert kitchen.run()[0] == 0

    @pytest.mark.parametrize("step", range(4))
    def test_a_crash_while_results_move_in_leaves_no_record_of_a_mixture(
        self, kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        """Whatever rename is the last one: where a record lies, it is that of the outputs beside it."""
        kitchen.run()
        kitchen.set(text="stew")
        calls = iter(range(9))
        rename = Path.replace

        def replace(self: Path, target: Path) -> Path:
            if next(calls) == step:
                raise RuntimeError("the machine is gone")
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        with imported(kitchen, monkeypatch) as cook, pytest.raises(RuntimeError, match="the machine is gone"):
            stage.execute(cook, None)
        record = kitchen.path / "data" / "cook" / "record.json"
        if record.exists():
            for path, digest in json.loads(record.read_text())["outputs"].items():
                assert identity.tree_hash(kitchen.path / path) == digest


def test_stages_side_by_side_keep_their_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate@encoder` begins and ends while `evaluate@encoder-int8` writes, and leaves it alone."""
    monkeypatch.chdir(tmp_path)
    with stage._scratch("evaluate@encoder-int8", {"answers": Path("data/a")}) as longer:
        longer["answers"].write_text("half")
        with stage._scratch("evaluate@encoder", {"answers": Path("data/b")}) as shorter:
            shorter["answers"].write_text("half")
        assert longer["answers"].read_text() == "half"
    assert list(stage.SCRATCH.iterdir()) == []


@pytest.mark.parametrize(
    ("launched", "processes", "expected"),
    [
        ({}, 3, r"3 processes .* lets this one use 2 cores, .*processes to 2 or less, or start torchrun on several"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3"}, 4, "3 processes .* 2 cores"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 4, "2 processes were started, but numerics.parallel.processes is 4"),
    ],
)
def test_each_process_finds_a_device_of_its_own(
    launched: dict[str, str], processes: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is loaded, and by what runs on this machine alone where there are several."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    trains = ModuleType("tasks.trains")
    trains.PARALLEL = True  # type: ignore[attr-defined]
    numerics = NUMERICS.model_copy(update={"parallel": Parallel(processes=processes, engine="data")})
    with pytest.raises(stage.StageError, match=expected) if expected else nullcontext():
        stage._gather_processes(trains, None, numerics)


def test_what_a_run_leaves_makes_no_checkout_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    assert stage.commit(tmp_path) == {"commit": None, "dirty": None}
    for name in ("code.py", "dvc.lock", "metrics/cook.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    for name in ("dvc.lock", "metrics/cook.json", "metrics/new.json"):
        (tmp_path / name).write_text("after")
    assert stage.commit(tmp_path)["dirty"] is False
    (tmp_path / "code.py").write_text("after")
    assert stage.commit(tmp_path)["dirty"] is True


class TestFailed:
    @pytest.mark.parametrize(
        ("way", "words"),
        [
            ("refuse", "cook: the pot is empty: fill data/raw.txt"),
            ("full", "cook: the disk is full"),
        ],
    )
    def test_what_the_user_can_mend_is_a_sentence(self, kitchen: Kitchen, way: str, words: str) -> None:
        kitchen.set(way=way)
        code, output = kitchen.run()
        assert code == 1
        assert output.startswith(words)
        assert "Traceback" not in output
        assert kitchen.tracked() == {}
        assert kitchen.scratch() == []

    def test_a_full_disk_tells_what_is_free_and_what_to_do(self, kitchen: Kitchen) -> None:
        kitchen.set(way="full")
        output = kitchen.run()[1]
        assert "MB free" in output
        assert "dvc gc" in output
        assert errno.ENOSPC == 28

    def test_an_output_that_was_not_written_is_no_success(self, kitchen: Kitchen) -> None:
        kitchen.set(way="forget")
        code, output = kitchen.run()
        assert code == 1
        assert "without writing data/cook/smell.txt" in output
        assert not (kitchen.path / "data" / "cook" / "record.json").exists()

    def test_a_missing_input_is_named(self, kitchen: Kitchen) -> None:
        (kitchen.path / "data" / "raw.txt").unlink()
        code, output = kitchen.run()
        assert code == 1
        assert "cook: data/raw.txt is missing" in output

    def test_a_key_that_there_is_not_is_refused(self, kitchen: Kitchen) -> None:
        code, output = kitchen.run("clm")
        assert code == 1
        assert output.startswith("usage: python -m cook")


class imported:
    """The stage `cook` as a module of this process, its folder the current one."""

    def __init__(self, kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kitchen, self.monkeypatch = kitchen, monkeypatch

    def __enter__(self) -> ModuleType:
        self.monkeypatch.chdir(self.kitchen.path)
        self.monkeypatch.syspath_prepend(self.kitchen.path)
        self.monkeypatch.setattr(stage, "check", lambda params, stages: None)
        identity._local_imports.cache_clear()
        return importlib.import_module("cook")

    def __exit__(self, *exception: object) -> None:
        sys.modules.pop("cook", None)
        identity._local_imports.cache_clear()
