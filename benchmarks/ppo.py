"""PPO against TRL 1.12.0's `PPOTrainer`, the last one that there was: speed, memory, reward, and one step side by side.

Run as `make bench-ppo` or `python -m benchmarks ppo`. TRL 1.12.0 is installed into a folder of its own
(`data/.cache/peers`), beside the newer one of the project; on a machine without an index, lay it there beforehand
(`pip install --no-deps --target data/.cache/peers/trl-1.12.0 trl==1.12.0`). Same weights, prompts, reply length, batch
and epochs on all sides; `like for like` is float32 with policy, reference and value function as models of their own,
the others bfloat16 where the processor has it, on one backbone, of which the last blocks or low-rank updates learn.
"""

import subprocess
import sys
from functools import partial
from typing import Any

from benchmarks import harness, machine
from benchmarks.harness import ROOT, BenchmarkError, Figures, Measured, Row

PEER = "trl-1.12.0"
FOLDER = ROOT / "data" / ".cache" / "peers" / PEER
NAME = "TRL 1.12.0's PPOTrainer"
CORES = 2
LEARNT = 16  # iterations that the reward's gain is measured over
SMALL = {"vocabulary": 4096, "hidden": 256, "layers": 5, "heads": 8, "feed_forward": 832}  # 5.6 M parameters
LARGE = {"vocabulary": 49152, "hidden": 576, "layers": 30, "heads": 9, "feed_forward": 1152}  # 135 M
SIDES = ("like-for-like", "last-blocks", "low-rank", "trl")


def threads() -> int:
    """Return the threads that all sides compute with."""
    return CORES


def check() -> None:
    """Install the peer where it is missing."""
    if not FOLDER.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)]
        done = subprocess.run([*command, "trl==1.12.0"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"TRL 1.12.0 cannot be installed into {FOLDER}: {done.stderr.strip()[-500:]}")


def measure(*, trial: bool) -> Measured:
    """Take turns on the small model, then one iteration each on the large one, then one step on the same replies."""
    rounds, iterations = (1, 2) if trial else (2, 5)
    speed = harness.alternate({side: partial(run, side, SMALL, iterations) for side in SIDES}, rounds)
    learnt = harness.alternate({side: partial(run, side, SMALL, 4 if trial else LEARNT) for side in SIDES}, 1)
    shape, episodes = (SMALL, 4) if trial else (LARGE, 2)
    memory = harness.alternate({side: partial(run, side, shape, 1, episodes=episodes) for side in SIDES[2:]}, 1)
    step = run("one-step", SMALL, 1, episodes=8)
    measured = Measured(rows(speed, learnt, memory, step), notes(speed, learnt, iterations))
    if machine.has_gpu():
        sides = {side: partial(run, side, LARGE, 4, device="cuda") for side in SIDES}
        measured.rows += gpu_rows(harness.alternate(sides, 1 if trial else 2))
    return measured


def run(side: str, shape: dict[str, int], iterations: int, *, episodes: int = 32, device: str = "cpu") -> Figures:
    """Do one run of `benchmarks/ppo_run.py`."""
    request: dict[str, Any] = {
        "side": side, "shape": shape, "iterations": iterations, "episodes": episodes, "threads": CORES,
        "peer": str(FOLDER), "device": device,
    }  # fmt: skip
    return harness.in_process("benchmarks.ppo_run", request)


def rows(
    speed: dict[str, list[Figures]], learnt: dict[str, list[Figures]], memory: dict[str, list[Figures]], step: Figures
) -> list[Row]:
    """Return our figures beside TRL's."""
    middle = {side: harness.median(rounds, "episodes_per_second") for side, rounds in speed.items()}
    gain = {side: rounds[0]["reward_last"] - rounds[0]["reward_first"] for side, rounds in learnt.items()}
    peak = {side: rounds[0]["peak_memory"] for side, rounds in memory.items()}
    return [
        Row("like for like", middle["like-for-like"], "episodes/s", middle["trl"], NAME, "ratio >= 1.1"),
        Row("one backbone, last two blocks", middle["last-blocks"], "episodes/s", middle["trl"], NAME, "ratio >= 4"),
        Row("one backbone, low rank", middle["low-rank"], "episodes/s", middle["trl"], NAME),
        Row("reward gained, like for like", gain["like-for-like"], "reward", gain["trl"], NAME),
        Row("reward gained, last two blocks", gain["last-blocks"], "reward", gain["trl"], NAME),
        Row("reward gained, low rank", gain["low-rank"], "reward", gain["trl"], NAME),
        Row("peak memory, 135 M, low rank", peak["low-rank"], "bytes", peak["trl"], NAME, "ratio <= 0.5"),
        Row("policy loss on the same replies", step["policy_loss"], "", step["trl_policy_loss"], NAME),
        Row("value loss on the same replies", step["value_loss"], "", step["trl_value_loss"], NAME),
        Row("weights after one step, largest difference in units of the largest change", step["difference"], "1"),
    ]


def gpu_rows(results: dict[str, list[Figures]]) -> list[Row]:
    """Return speed and memory on a GPU, where all sides train a model of 135 M parameters."""
    middle = {
        side: {name: harness.median(rounds, name) for name in ("episodes_per_second", "peak_memory")}
        for side, rounds in results.items()
    }
    peer, found = middle.pop("trl"), list[Row]()
    for side, figures in middle.items():
        told = f"GPU, 135 M, {side.replace('-', ' ')}"
        found += [
            Row(told, figures["episodes_per_second"], "episodes/s", peer["episodes_per_second"], NAME),
            Row(f"{told}, peak memory", figures["peak_memory"], "bytes", peer["peak_memory"], NAME),
        ]
    return found


def notes(speed: dict[str, list[Figures]], learnt: dict[str, list[Figures]], iterations: int) -> list[str]:
    """Say what was run, and how far the rounds lie apart."""
    ours = learnt["low-rank"][0]
    return [
        f"Batches of 32 replies of 48 tokens, 4 epochs, one update an epoch, AdamW, {iterations} iterations a round.",
        f"The reward is a fresh model's, one on all sides; gains are over {LEARNT} iterations, means of the last 5.",
        f"bfloat16 on this processor: {'built in' if ours['bfloat16'] else 'not built in, computed in float32'}.",
        "TRL divides by n - 1 where it whitens, we by n: on n tokens its advantages are smaller by 1 part in 2n.",
        harness.spread(speed, "episodes_per_second"),
    ]
