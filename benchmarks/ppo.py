"""PPO against the last `PPOTrainer` of TRL (1.12.0): speed, reward, memory, and a comparison of one step.

Run as `make bench-ppo` or `python -m benchmarks ppo`, in a project where `bessemer run` has finished. TRL 1.12.0 is
installed into a separate folder (`data/.cache/peers`), beside the project's newer TRL. On a machine without a package
index, install it beforehand (`pip install --no-deps --target data/.cache/peers/trl-1.12.0 trl==1.12.0`).

All sides have the same weights, prompts, reply length, batch, epochs and reward. `like for like` is float32 with
separate policy, reference and value models. The others train the last block or LoRA on one shared backbone, in bfloat16
if the CPU supports it. There are two tasks: a model of 5.6 M parameters with random weights, whose replies all have 48
tokens; and the default chain's tuned model, questions and reward, where the reward gain is meaningful and most replies
end before the length limit.
"""

import subprocess
import sys
from functools import partial
from typing import Any

from benchmarks import harness, machine
from benchmarks.harness import ROOT, BenchmarkError, Figures, Measurements, Row
from benchmarks.ppo_work import REQUIRED_PATHS

PEER = "trl-1.12.0"
PEER_FOLDER = ROOT / "data" / ".cache" / "peers" / PEER
PEER_NAME = "TRL 1.12.0's PPOTrainer"
THREADS = 2
ITERATIONS, EPISODES = 18, 96  # for the tuned model, as in the default profile
SEEDS = (1, 2, 3)  # for the tuned model
SMALL = {"vocabulary": 4096, "hidden": 256, "layers": 5, "heads": 8, "feed_forward": 832}  # 5.6 M parameters
LARGE = {"vocabulary": 49152, "hidden": 576, "layers": 30, "heads": 9, "feed_forward": 1152}  # 135 M
SIDES = ("like-for-like", "last-block", "low-rank", "trl")
TUNED_SIDES = ("like-for-like", "last-block", "trl")
LEARNING_FIGURES = ("episodes_per_second", "reward_last", "kl_last")


def threads() -> int:
    """Return the number of threads of all sides."""
    return THREADS


def check() -> None:
    """Install the peer if it is missing; raise BenchmarkError if the chain's outputs are missing."""
    harness.require_paths(*REQUIRED_PATHS, remedy="run `bessemer run` first.")
    if not PEER_FOLDER.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEER_FOLDER)]
        done = subprocess.run([*command, "trl==1.12.0"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"TRL 1.12.0 cannot be installed into {PEER_FOLDER}: {done.stderr.strip()[-500:]}")


def measure(*, trial: bool) -> Measurements:
    """Measure speed on the fresh model, learning on the tuned one, memory on the large one, then compare one step."""
    rounds, iterations, learning, seeds = (1, 2, 2, SEEDS[:1]) if trial else (3, 5, ITERATIONS, SEEDS)
    speed = harness.alternate({side: partial(run, side, SMALL, iterations) for side in SIDES}, rounds)
    tuned_runs: dict[str, list[Figures]] = {side: [] for side in TUNED_SIDES}
    for seed in seeds:
        sides = {side: partial(run, side, None, learning, episodes=EPISODES, seed=seed) for side in TUNED_SIDES}
        for side, figures in harness.alternate(sides, 1).items():
            tuned_runs[side] += figures
    shape, episodes = (SMALL, 4) if trial else (LARGE, 2)
    memory = harness.alternate({side: partial(run, side, shape, 1, episodes=episodes) for side in SIDES[2:]}, 1)
    step = run("one-step", SMALL, 1, episodes=8)
    measured = Measurements(
        rows(speed, tuned_runs, memory, step, learning * EPISODES), notes(speed, tuned_runs, iterations)
    )
    if machine.has_gpu():
        sides = {side: partial(run, side, LARGE, 4, device="cuda") for side in SIDES}
        measured.rows += gpu_rows(harness.alternate(sides, 1 if trial else 2))
    return measured


def run(
    side: str, shape: dict[str, int] | None, iterations: int, *, episodes: int = 32, device: str = "cpu", seed: int = 1
) -> Figures:
    """Run `benchmarks/ppo_run.py` once, on a fresh model of a shape, or on the tuned one if `shape` is None."""
    request: dict[str, Any] = {
        "side": side, "shape": shape, "iterations": iterations, "episodes": episodes, "threads": THREADS,
        "peer": str(PEER_FOLDER), "device": device, "seed": seed,
    }  # fmt: skip
    return harness.run_module("benchmarks.ppo_run", request)


def rows(
    speed: dict[str, list[Figures]], tuned_runs: dict[str, list[Figures]], memory: dict[str, list[Figures]],
    step: Figures, episodes: int,
) -> list[Row]:  # fmt: skip
    """Return our figures beside TRL's; those on the tuned model are medians over seeds after `episodes` episodes."""
    middle = {side: harness.median(rounds, "episodes_per_second") for side, rounds in speed.items()}
    tuned = {
        side: {name: harness.median(rounds, name) for name in LEARNING_FIGURES} for side, rounds in tuned_runs.items()
    }
    peak = {side: rounds[0]["peak_memory"] for side, rounds in memory.items()}
    theirs, speeds = tuned["trl"], {side: figures["episodes_per_second"] for side, figures in tuned.items()}
    start = harness.median([figures for rounds in tuned_runs.values() for figures in rounds], "reward_first")
    gain = f"reward gained in {episodes:,} episodes, tuned model"
    peer_gain = ("rating points", theirs["reward_last"] - start, PEER_NAME)
    return [
        Row("like for like", middle["like-for-like"], "episodes/s", middle["trl"], PEER_NAME, "ratio >= 1.1"),
        Row("last block", middle["last-block"], "episodes/s", middle["trl"], PEER_NAME),
        Row("low rank", middle["low-rank"], "episodes/s", middle["trl"], PEER_NAME),
        Row(
            "tuned model, like for like",
            speeds["like-for-like"],
            "episodes/s",
            speeds["trl"],
            PEER_NAME,
            "ratio >= 1.1",
        ),
        Row("tuned model, last block", speeds["last-block"], "episodes/s", speeds["trl"], PEER_NAME, "ratio >= 4"),
        Row(f"{gain}, like for like", tuned["like-for-like"]["reward_last"] - start, *peer_gain),
        Row(f"{gain}, last block", tuned["last-block"]["reward_last"] - start, *peer_gain, "ratio >= 1"),
        Row("its KL, like for like", tuned["like-for-like"]["kl_last"], "nats a reply", theirs["kl_last"], PEER_NAME),
        Row("its KL, last block", tuned["last-block"]["kl_last"], "nats a reply", theirs["kl_last"], PEER_NAME),
        Row("peak memory, 135 M, low rank", peak["low-rank"], "bytes", peak["trl"], PEER_NAME, "ratio <= 0.5"),
        Row("policy loss on the same replies", step["policy_loss"], "", step["trl_policy_loss"], PEER_NAME),
        Row("value loss on the same replies", step["value_loss"], "", step["trl_value_loss"], PEER_NAME),
        Row("weights after one step, largest difference in units of the largest change", step["difference"], "1"),
    ]


def gpu_rows(results: dict[str, list[Figures]]) -> list[Row]:
    """Return speed and memory on a GPU, with a model of 135 M parameters."""
    middle = {
        side: {name: harness.median(rounds, name) for name in ("episodes_per_second", "peak_memory")}
        for side, rounds in results.items()
    }
    peer, found = middle.pop("trl"), list[Row]()
    for side, figures in middle.items():
        what = f"GPU, 135 M, {side.replace('-', ' ')}"
        found += [
            Row(what, figures["episodes_per_second"], "episodes/s", peer["episodes_per_second"], PEER_NAME),
            Row(f"{what}, peak memory", figures["peak_memory"], "bytes", peer["peak_memory"], PEER_NAME),
        ]
    return found


def notes(speed: dict[str, list[Figures]], tuned_runs: dict[str, list[Figures]], iterations: int) -> list[str]:
    """Return notes on the settings and the variation between rounds."""
    ours = speed["last-block"][0]
    return [
        f"Fresh model: 32 replies of 48 tokens, 4 epochs, one update an epoch, AdamW, {iterations} iterations a round.",
        f"Tuned model: the default chain's, with its questions, reward, episodes ({EPISODES} an iteration), epochs, "
        "reply length and KL coefficient, without its pretraining term; reward and KL are means of a run's last 5 "
        f"iterations and medians of {len(tuned_runs['trl'])} seeds; gains are from the median of all first iterations.",
        "TRL and like for like have a constant learning rate of 3e-4; the last block starts at 3.5e-3, LoRA at 6e-3, "
        "both with the profile's cosine schedule.",
        f"bfloat16 on this processor: {'built in' if ours['bfloat16'] else 'not built in, computed in float32'}.",
        "TRL divides by n - 1 where it whitens, we by n: on n tokens its advantages are smaller by 1 part in 2n.",
        harness.spread(speed, "episodes_per_second"),
        *(f"Tuned model, {harness.spread(tuned_runs, figure)}" for figure in LEARNING_FIGURES),
    ]
