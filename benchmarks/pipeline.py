"""The whole chain: how long it took, what it needed, what its models can do, each beside its target.

Run as `make bench-pipeline` or `python -m benchmarks pipeline`. The chain is not run here: read is what its last
complete run measured (`runs/`), which must have done every stage itself, and the sheet in `metrics/`. Measured here is
a second run with nothing to do. Peers: a bag of words for the reward model, the model before for every step.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Measured, Row
from flows.results import agrees

SHEET = "metrics/evaluate.json"
CAPITAL = "The capital of [MASK] is Paris."


def check() -> None:
    """Raise BenchmarkError where the chain has never come to its sheet."""
    harness.needed(harness.ROOT / SHEET, harness.ROOT / "runs", remedy="run `bessemer run` first.")


def threads() -> int:
    """Return the threads that the chain computes with: those of its stages, side by side."""
    from tasks.common.settings import read_params

    params = read_params(harness.ROOT / "params.yaml")
    return int(params["numerics"]["threads"]) * int(params["placement"]["side_by_side"])


def measure(*, trial: bool) -> Measured:
    """Read the last complete run and the sheet, and run the chain once more."""
    whole = last_complete(harness.ROOT)
    measured = Measured([*run_rows(whole), *idle_rows(1 if trial else 5), *quality_rows(harness.ROOT)])
    measured.notes.append(
        f"The chain as run by {whole.name}, commit {whole.commit}." if whole else
        "No run did all the stages itself, so there is no time of the whole chain: run `bessemer run` in a fresh clone."
    )  # fmt: skip
    return measured


@dataclass(frozen=True)
class Whole:
    """A run that did every stage: the stages' own figures, and how the flow saw them end."""

    name: str
    stages: list[dict[str, Any]]
    outcomes: dict[str, dict[str, Any]]

    @property
    def commit(self) -> str:
        """The commit that it ran from, as its stages noted it."""
        commits = sorted({f"{log['commit']}{' with changes' if log['dirty'] else ''}" for log in self.stages})
        return " and ".join(commits)

    @property
    def seconds(self) -> float:
        """Seconds from the flow's start, which its name tells, to the end of its last step."""
        begun = datetime.strptime(f"{self.name[:19]}+0000", "run-%Y%m%d-%H%M%S%z")
        last = max(end(log) for log in self.stages)
        build: float = self.outcomes.get("build", {}).get("seconds", 0.0)
        return (last - begun).total_seconds() + build


def last_complete(project: Path) -> Whole | None:
    """Return the latest run that made, from nothing and by itself, all that lies in the project; None for none."""
    for path in sorted(project.glob("runs/run-*/flow.json"), reverse=True):
        outcomes = json.loads(path.read_text(encoding="utf-8"))["stages"]
        stages = {name: outcome for name, outcome in outcomes.items() if name != "build"}
        if "package" not in stages or any(outcome["status"] != "ran" for outcome in stages.values()):
            continue
        logs = [json.loads(path.with_name(f"{name}.json").read_text(encoding="utf-8")) for name in stages]
        if all(agrees(project, log) for log in logs):
            return Whole(path.parent.name, logs, outcomes)
    return None


def begin(log: dict[str, Any]) -> datetime:
    """Return when a stage began to work."""
    return datetime.fromisoformat(log["started"])


def end(log: dict[str, Any]) -> datetime:
    """Return when a stage was done."""
    return begin(log) + timedelta(seconds=log["seconds"])


def memory_together(stages: list[dict[str, Any]]) -> int:
    """Return the largest sum of the peaks of stages that ran at the same time: at least what they really needed."""
    at_once = ([log for log in stages if begin(log) <= begin(first) < end(log)] for first in stages)
    return max(sum(int(log["peak_memory_bytes"]) for log in together) for together in at_once)


def run_rows(whole: Whole | None) -> list[Row]:
    """Return time and memory of the chain."""
    if whole is None:
        return [
            Row("chain from nothing", None, "s", target="<= 720"),
            Row("peak memory of the chain", None, "GB", target="<= 6"),
        ]
    peaks = {log["stage"]: log["peak_memory_bytes"] / 1e9 for log in whole.stages}
    hungry = max(peaks, key=lambda name: peaks[name])
    return [
        Row("chain from nothing", whole.seconds, "s", target="<= 720"),
        Row("stages one after the other would take", sum(log["seconds"] for log in whole.stages), "s"),
        Row(f"peak memory of the largest stage, {hungry}", peaks[hungry], "GB"),
        Row("peak memory of the chain: peaks of stages at the same time, summed", memory_together(whole.stages) / 1e9,
            "GB", target="<= 6"),
    ]  # fmt: skip


def idle_rows(rounds: int) -> list[Row]:
    """Return the seconds of a run that has nothing to do; not measured where there is something to do."""
    from flows import graph

    changed = any(stage.dirty for stage in graph.read(harness.ROOT).values())
    commands = {"bessemer run": [sys.executable, "-c", "from flows.cli import main; main()", "run"]}
    if subprocess.run(["make", "-q", ".venv/.dev"], cwd=harness.ROOT, capture_output=True, check=False).returncode == 0:
        commands["make run"] = ["make", "run"]  # and the sample answers that it ends with
    return [
        Row(f"`{name}` again, nothing changed", None if changed else idle(command, rounds), "s", target="<= 5")
        for name, command in commands.items()
    ]


def idle(command: list[str], rounds: int) -> float | None:
    """Return the median seconds of a command that must say that nothing has changed; None where it says otherwise."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=harness.ROOT, env=dict(os.environ), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        seconds.append({"seconds": time.perf_counter() - started})
        if done.returncode or "Nothing has changed" not in done.stdout:
            print(
                f"    {' '.join(command)} ended with {done.returncode} and said:\n{(done.stdout + done.stderr)[-2000:]}"
            )
            return None
    return harness.median(seconds, "seconds")


def quality_rows(project: Path) -> list[Row]:
    """Return what the models can do, and what each step gained and cost."""
    metrics = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in project.glob("metrics/*.json")}
    models = {model["model"]: model for model in metrics["evaluate"]["models"]}
    tuned, policy, pruned, int8 = (models[name] for name in ("tuned", "policy", "pruned", "int8"))
    return [
        Row("masked names, capitals seen in pretraining", models["encoder"]["masked_names"], "share", target=">= 0.9"),
        Row("masked names after INT8", models["encoder-int8"]["masked_names"], "share",
            models["encoder"]["masked_names"], "FP32"),
        Row(f"{CAPITAL} gives France", france(project), "1 = yes", target=">= 1"),
        Row("exact match, tuned questions", tuned["exact_match_tuned"], "share", target=">= 0.95"),
        Row("exact match, held-out entities", tuned["exact_match_heldout"], "share", target=">= 0.6"),
        *reward_rows(metrics["reward@policy"]),
        *ppo_rows(tuned, policy),
        *drops("pruning", policy, pruned, "<= 0.03"),
        Row("pruning: parameters removed", metrics["prune"]["removed"], "share", target=">= 0.25"),
        *drops("INT8", pruned, int8, "<= 0.02"),
        *int8_rows(project, metrics["quantize@policy"]),
    ]  # fmt: skip


def reward_rows(reward: dict[str, Any]) -> list[Row]:
    """Return the reward model's accuracy: high enough, and not below that of a bag of words."""
    found = reward.get("gap_at_least_1", {"pairs": 0, "model": None, "bag_of_words": None})
    name, words = f"reward model, {found['pairs']} held-out pairs with a gap of 1 or more", found["bag_of_words"]
    peer = None if words is None else "bag of words"
    return [
        Row(name, found["model"], "share", target=">= 0.8"),
        Row(f"{name}, against words alone", found["model"], "share", words, peer, "ratio >= 1"),
    ]


def ppo_rows(tuned: dict[str, Any], policy: dict[str, Any]) -> list[Row]:
    """Return what PPO gained in reward, and what it cost in facts and in variety."""
    gain = policy["reward_mean"] - tuned["reward_mean"]
    return [
        Row("PPO: mean reward gained", gain, "rating points", target=">= 0.5"),
        Row("PPO: mean reward gained", gain / tuned["reward_std"], "standard deviations", target=">= 1"),
        *drops("PPO", tuned, policy, "<= 0.03"),
        Row("PPO: distinct-2", policy["distinct_2"], "share", tuned["distinct_2"], "tuned model", "ratio >= 0.7"),
    ]


def drops(step: str, before: dict[str, Any], after: dict[str, Any], target: str) -> list[Row]:
    """Return what a step cost in exact match, on both sides of the sheet."""
    sides = {"exact_match_tuned": "tuned questions", "exact_match_heldout": "held-out entities"}
    return [
        Row(f"{step}: exact match lost, {side}", before[rate] - after[rate], "share", target=target)
        for rate, side in sides.items()
    ]


def int8_rows(project: Path, sizes: dict[str, Any]) -> list[Row]:
    """Return INT8's size and the speed that the stage measured when it last ran; `serve` measures it afresh."""
    from flows.records import last_logs

    rows = [Row("INT8: size of the file", sizes["bytes"], "bytes", sizes["fp32_bytes"], "FP32 ONNX", "ratio <= 0.28")]
    speeds = last_logs(project).get("quantize@policy")
    if speeds and agrees(project, speeds):
        ours, peer = (speeds[f"{name}_tokens_per_second"] for name in ("int8", "torch_fp32"))
        rows.append(Row("INT8: decoding", ours, "tokens/s", peer, "torch FP32 generate", "ratio >= 4"))
    return rows


def france(project: Path) -> float | None:
    """Return 1 where the packaged encoder puts France first, 0 where another name; None where nothing is packaged."""
    from serving.errors import ServingError
    from serving.package import open_package

    try:
        best = open_package(project / "data" / "package").masks.fill(CAPITAL, 1)[0][0].name
    except ServingError:
        return None
    print(f"    {CAPITAL} -> {best}")
    return int(best == "France")
