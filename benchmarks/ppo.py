"""PPO against TRL 1.12.0's `PPOTrainer`, the last one that there was: speed, reward, memory, and one step side by side.

Run as `make bench-ppo` or `python -m benchmarks ppo`, in a project in which `bessemer run` is through. TRL 1.12.0 is
installed into a folder of its own (`data/.cache/peers`), beside the newer one of the project; on a machine without an
index, lay it there beforehand (`pip install --no-deps --target data/.cache/peers/trl-1.12.0 trl==1.12.0`).

Same weights, prompts, reply length, batch, epochs and reward on all sides. `like for like` is float32 with policy,
reference and value function as models of their own; the others compute in bfloat16 where the processor has it, on one
backbone, of which the last block or low-rank updates learn. There are two jobs: a fresh model of 5.6 M parameters, all
of whose replies are of 48 tokens, and the default chain's tuned model, questions and reward, where what is gained tells
something and most replies end before their most tokens.
"""

import subprocess
import sys
from functools import partial
from typing import Any

from benchmarks import harness, machine
from benchmarks.harness import ROOT, BenchmarkError, Figures, Measured, Row
from benchmarks.ppo_work import NEEDED

PEER = "trl-1.12.0"
FOLDER = ROOT / "data" / ".cache" / "peers" / PEER
NAME = "TRL 1.12.0's PPOTrainer"
CORES = 2
ITERATIONS, EPISODES = 18, 96  # of the tuned model, as the default profile has them
SEEDS = (1, 2, 3)  # of the tuned model's runs
SMALL = {"vocabulary": 4096, "hidden": 256, "layers": 5, "heads": 8, "feed_forward": 832}  # 5.6 M parameters
LARGE = {"vocabulary": 49152, "hidden": 576, "layers": 30, "heads": 9, "feed_forward": 1152}  # 135 M
SIDES = ("like-for-like", "last-block", "low-rank", "trl")
ON_TUNED = ("like-for-like", "last-block", "trl")
LEARNT = ("episodes_per_second", "reward_last", "kl_last")


def threads() -> int:
    """Return the threads that all sides compute with."""
    return CORES


def check() -> None:
    """Install the peer where it is missing; raise BenchmarkError where the chain is."""
    harness.needed(*NEEDED, remedy="run `bessemer run` first.")
    if not FOLDER.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)]
        done = subprocess.run([*command, "trl==1.12.0"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"TRL 1.12.0 cannot be installed into {FOLDER}: {done.stderr.strip()[-500:]}")


def measure(*, trial: bool) -> Measured:
    """Take turns on the fresh and the tuned model, then one iteration each on the large one, then one step."""
    rounds, iterations, learning, seeds = (1, 2, 2, SEEDS[:1]) if trial else (3, 5, ITERATIONS, SEEDS)
    speed = harness.alternate({side: partial(run, side, SMALL, iterations) for side in SIDES}, rounds)
    learnt: dict[str, list[Figures]] = {side: [] for side in ON_TUNED}
    for seed in seeds:
        sides = {side: partial(run, side, None, learning, episodes=EPISODES, seed=seed) for side in ON_TUNED}
        for side, figures in harness.alternate(sides, 1).items():
            learnt[side] += figures
    shape, episodes = (SMALL, 4) if trial else (LARGE, 2)
    memory = harness.alternate({side: partial(run, side, shape, 1, episodes=episodes) for side in SIDES[2:]}, 1)
    step = run("one-step", SMALL, 1, episodes=8)
    measured = Measured(rows(speed, learnt, memory, step, learning * EPISODES), notes(speed, learnt, iterations))
    if machine.has_gpu():
        sides = {side: partial(run, side, LARGE, 4, device="cuda") for side in SIDES}
        measured.rows += gpu_rows(harness.alternate(sides, 1 if trial else 2))
    return measured


def run(
    side: str, shape: dict[str, int] | None, iterations: int, *, episodes: int = 32, device: str = "cpu", seed: int = 1
) -> Figures:
    """Do one run of `benchmarks/ppo_run.py`, on a fresh model of a shape or on the tuned one."""
    request: dict[str, Any] = {
        "side": side, "shape": shape, "iterations": iterations, "episodes": episodes, "threads": CORES,
        "peer": str(FOLDER), "device": device, "seed": seed,
    }  # fmt: skip
    return harness.in_process("benchmarks.ppo_run", request)


def rows(
    speed: dict[str, list[Figures]], learnt: dict[str, list[Figures]], memory: dict[str, list[Figures]],
    step: Figures, episodes: int,
) -> list[Row]:  # fmt: skip
    """Return our figures beside TRL's; the tuned model's are the medians of the seeds after so many episodes."""
    middle = {side: harness.median(rounds, "episodes_per_second") for side, rounds in speed.items()}
    tuned = {side: {name: harness.median(rounds, name) for name in LEARNT} for side, rounds in learnt.items()}
    peak = {side: rounds[0]["peak_memory"] for side, rounds in memory.items()}
    theirs, speeds = tuned["trl"], {side: figures["episodes_per_second"] for side, figures in tuned.items()}
    start = harness.median([figures for rounds in learnt.values() for figures in rounds], "reward_first")
    gain = f"reward gained in {episodes:,} episodes, tuned model"
    told = ("rating points", theirs["reward_last"] - start, NAME)
    return [
        Row("like for like", middle["like-for-like"], "episodes/s", middle["trl"], NAME, "ratio >= 1.1"),
        Row("last block", middle["last-block"], "episodes/s", middle["trl"], NAME),
        Row("low rank", middle["low-rank"], "episodes/s", middle["trl"], NAME),
        Row("tuned model, like for like", speeds["like-for-like"], "episodes/s", speeds["trl"], NAME, "ratio >= 1.1"),
        Row("tuned model, last block", speeds["last-block"], "episodes/s", speeds["trl"], NAME, "ratio >= 4"),
        Row(f"{gain}, like for like", tuned["like-for-like"]["reward_last"] - start, *told),
        Row(f"{gain}, last block", tuned["last-block"]["reward_last"] - start, *told, "ratio >= 1"),
        Row("its KL, like for like", tuned["like-for-like"]["kl_last"], "nats a reply", theirs["kl_last"], NAME),
        Row("its KL, last block", tuned["last-block"]["kl_last"], "nats a reply", theirs["kl_last"], NAME),
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
    ours = speed["last-block"][0]
    return [
        f"Fresh model: 32 replies of 48 tokens, 4 epochs, one update an epoch, AdamW, {iterations} iterations a round.",
        f"Tuned model: the default chain's, with its questions, reward, episodes ({EPISODES} an iteration), epochs, "
        "reply length and price of KL, without its pretraining term; reward and KL are means of a run's last 5 "
        f"iterations and medians of {len(learnt['trl'])} seeds, gained from the median of all first iterations.",
        "TRL and like for like learn at 3e-4 throughout; the last block begins at 3.5e-3, low-rank updates at 6e-3, "
        "and both fall by the profile's cosine.",
        f"bfloat16 on this processor: {'built in' if ours['bfloat16'] else 'not built in, computed in float32'}.",
        "TRL divides by n - 1 where it whitens, we by n: on n tokens its advantages are smaller by 1 part in 2n.",
        harness.spread(speed, "episodes_per_second"),
        *(f"Tuned model, {harness.spread(learnt, figure)}" for figure in LEARNT),
    ]
