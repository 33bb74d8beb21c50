"""The whole chain: time, memory and quality of its models, each with its target.

Run as `make bench-pipeline` or `python -m benchmarks pipeline`. The chain is not run here: the figures come from its
last complete run (`runs/`), which must have run every stage, and from the scorecard in `metrics/`. Only a second run
without changes is measured. Peers: a bag of words for the reward model, the preceding model for every step.
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
from benchmarks.harness import Measurements, Row
from flows.results import matches_record

SCORECARD = "metrics/evaluate.json"
CAPITAL = "The capital of [MASK] is Paris."


def check() -> None:
    """Raise BenchmarkError if the chain has no scorecard."""
    harness.require_paths(harness.ROOT / SCORECARD, harness.ROOT / "runs", remedy="run `bessemer run` first.")


def threads() -> int:
    """Return the number of threads of the chain: threads per stage x parallel stages."""
    from tasks.common.defaults import read_settings

    params = read_settings(harness.ROOT / "params.yaml")
    return int(params["numerics"]["threads"]) * int(params["placement"]["max_parallel_stages"])


def measure(*, trial: bool) -> Measurements:
    """Read the last complete run and the scorecard, and time a run without changes."""
    whole = last_complete_run(harness.ROOT)
    measured = Measurements([*run_rows(whole), *idle_rows(1 if trial else 5), *quality_rows(harness.ROOT)])
    measured.notes.append(
        f"The chain as run by {whole.name}, commit {whole.commit}." if whole else
        "No run has run all stages, so the time of the whole chain is unknown: run `bessemer run` in a fresh clone."
    )  # fmt: skip
    return measured


STEPS_WITHOUT_RECORD = ("code", "build")


@dataclass(frozen=True)
class CompleteRun:
    """A run of all stages: the stages' logs, and their outcomes as recorded by the flow."""

    name: str
    stages: list[dict[str, Any]]
    outcomes: dict[str, dict[str, Any]]

    @property
    def commit(self) -> str:
        """The commit of its code, from the stages' logs."""
        commits = sorted({f"{log['commit']}{' with changes' if log['dirty'] else ''}" for log in self.stages})
        return " and ".join(commits)

    @property
    def seconds(self) -> float:
        """Seconds from the flow's start, taken from the run's name, to the end of its last step."""
        started = datetime.strptime(f"{self.name[:19]}+0000", "run-%Y%m%d-%H%M%S%z")
        last = max(end_time(log) for log in self.stages)
        build: float = self.outcomes.get("build", {}).get("seconds", 0.0)
        return (last - started).total_seconds() + build


def last_complete_run(project: Path) -> CompleteRun | None:
    """Return the latest run that produced all current outputs of the project, or None."""
    for path in sorted(project.glob("runs/run-*/flow.json"), reverse=True):
        outcomes = json.loads(path.read_text(encoding="utf-8"))["stages"]
        stages = {name: outcome for name, outcome in outcomes.items() if name not in STEPS_WITHOUT_RECORD}
        if "package" not in stages or any(outcome["status"] != "ran" for outcome in stages.values()):
            continue
        logs = [json.loads(path.with_name(f"{name}.json").read_text(encoding="utf-8")) for name in stages]
        if all(matches_record(project, log) for log in logs):
            return CompleteRun(path.parent.name, logs, outcomes)
    return None


def start_time(log: dict[str, Any]) -> datetime:
    """Return a stage's start time."""
    return datetime.fromisoformat(log["started"])


def end_time(log: dict[str, Any]) -> datetime:
    """Return a stage's end time."""
    return start_time(log) + timedelta(seconds=log["seconds"])


def concurrent_peak_memory(stages: list[dict[str, Any]]) -> int:
    """Return the largest sum of the peak memory of concurrent stages, an upper bound of the real use."""
    groups = ([log for log in stages if start_time(log) <= start_time(first) < end_time(log)] for first in stages)
    return max(sum(int(log["peak_memory_bytes"]) for log in group) for group in groups)


def run_rows(whole: CompleteRun | None) -> list[Row]:
    """Return the rows on time and memory of the chain."""
    if whole is None:
        return [
            Row("chain from nothing", None, "s", target="<= 720"),
            Row("peak memory of the chain", None, "GB", target="<= 6"),
        ]
    peaks = {log["stage"]: log["peak_memory_bytes"] / 1e9 for log in whole.stages}
    largest = max(peaks, key=lambda name: peaks[name])
    return [
        Row("chain from nothing", whole.seconds, "s", target="<= 720"),
        Row("stages one after the other would take", sum(log["seconds"] for log in whole.stages), "s"),
        Row(f"peak memory of the largest stage, {largest}", peaks[largest], "GB"),
        Row("peak memory of the chain: peaks of stages at the same time, summed",
            concurrent_peak_memory(whole.stages) / 1e9, "GB", target="<= 6"),
    ]  # fmt: skip


def idle_rows(rounds: int) -> list[Row]:
    """Return the seconds of a run without changes; not measured if a stage is out of date."""
    from flows import graph

    changed = any(stage.dirty for stage in graph.read(harness.ROOT).values())
    commands = {"bessemer run": [sys.executable, "-c", "from flows.cli import main; main()", "run"]}
    if subprocess.run(["make", "-q", ".venv/.dev"], cwd=harness.ROOT, capture_output=True, check=False).returncode == 0:
        commands["make run"] = ["make", "run"]  # includes the sample answers at its end
    return [
        Row(f"`{name}` again, nothing changed", None if changed else time_idle_run(command, rounds), "s", target="<= 3")
        for name, command in commands.items()
    ]


def time_idle_run(command: list[str], rounds: int) -> float | None:
    """Return the median seconds of a command that must print "Nothing has changed"; None if it does not."""
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
                f"    {' '.join(command)} ended with {done.returncode}. Output:\n{(done.stdout + done.stderr)[-2000:]}"
            )
            return None
    return harness.median(seconds, "seconds")


def quality_rows(project: Path) -> list[Row]:
    """Return the quality of the models, and the gain and cost of each step."""
    metrics = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in project.glob("metrics/*.json")}
    models = {model["model"]: model for model in metrics["evaluate"]["models"]}
    tuned, policy, pruned, int8 = (models[name] for name in ("tuned", "policy", "pruned", "chat"))
    return [
        Row("masked names, capitals seen in pretraining", models["encoder"]["masked_names"], "share", target=">= 0.9"),
        Row("masked names after INT8", models["encoder-int8"]["masked_names"], "share",
            models["encoder"]["masked_names"], "FP32"),
        Row(f"{CAPITAL} gives France", france_is_first(project), "1 = yes", target=">= 1"),
        Row("exact match, seen entities", tuned["exact_match_seen"], "share", target=">= 0.95"),
        Row("exact match, held-out entities", tuned["exact_match_heldout"], "share", target=">= 0.6"),
        *reward_rows(metrics["reward@train"]),
        *ppo_rows(tuned, policy),
        *drop_rows("pruning", policy, pruned, "<= 0.03"),
        Row("pruning: parameters removed", metrics["prune@pruned"]["removed"], "share", target=">= 0.25"),
        *drop_rows("INT8", pruned, int8, "<= 0.02"),
        *int8_rows(project, metrics["quantize@chat"]),
    ]  # fmt: skip


def reward_rows(reward: dict[str, Any]) -> list[Row]:
    """Return the reward model's accuracy, absolute and against a bag of words."""
    found = reward.get("gap_at_least_1", {"pairs": 0, "model": None, "bag_of_words": None})
    name, words = f"reward model, {found['pairs']} held-out pairs with a gap of 1 or more", found["bag_of_words"]
    peer = None if words is None else "bag of words"
    return [
        Row(name, found["model"], "share", target=">= 0.8"),
        Row(f"{name}, against words alone", found["model"], "share", words, peer, "ratio >= 1"),
    ]


def ppo_rows(tuned: dict[str, Any], policy: dict[str, Any]) -> list[Row]:
    """Return PPO's gain in reward, and its loss of exact match and of distinct word pairs."""
    gain = policy["reward_mean"] - tuned["reward_mean"]
    return [
        Row("PPO: mean reward gained", gain, "rating points", target=">= 0.5"),
        Row("PPO: mean reward gained", gain / tuned["reward_std"], "standard deviations", target=">= 1"),
        *drop_rows("PPO", tuned, policy, "<= 0.03"),
        Row("PPO: distinct-2", policy["distinct_2"], "share", tuned["distinct_2"], "tuned model", "ratio >= 0.7"),
    ]


def drop_rows(step: str, before: dict[str, Any], after: dict[str, Any], target: str) -> list[Row]:
    """Return a step's loss of exact match, on seen and on held-out entities."""
    sides = {"exact_match_seen": "seen entities", "exact_match_heldout": "held-out entities"}
    return [
        Row(f"{step}: exact match lost, {side}", before[rate] - after[rate], "share", target=target)
        for rate, side in sides.items()
    ]


def int8_rows(project: Path, sizes: dict[str, Any]) -> list[Row]:
    """Return INT8's file size, and the speed from the stage's last run; `serve` measures the speed anew."""
    from flows.records import last_logs

    rows = [Row("INT8: size of the file", sizes["bytes"], "bytes", sizes["fp32_bytes"], "FP32", "ratio <= 0.28")]
    speeds = last_logs(project).get("quantize@chat")
    if speeds and matches_record(project, speeds):
        ours, peer = (speeds[f"{name}_tokens_per_second"] for name in ("int8", "torch_fp32"))
        rows.append(Row("INT8: decoding", ours, "tokens/s", peer, "torch FP32 generate", "ratio >= 4"))
    return rows


def france_is_first(project: Path) -> float | None:
    """Return 1 if the packaged encoder ranks France first, else 0; None without a packaged encoder."""
    from serving.errors import ServingError
    from serving.package import open_package

    try:
        best = open_package(project / "data" / "package").masks.fill(CAPITAL, 1)[0][0].name
    except ServingError:
        return None
    print(f"    {CAPITAL} -> {best}")
    return int(best == "France")
