"""Robustness of PPO to the seed: the default profile's tuned model aligned with five seeds, on the same scorecard.

Run as `make bench-seeds` or `python -m benchmarks seeds`, in a project where `bessemer run` has finished. The seed
determines prompts, replies and minibatches; the tuned model and the reward model are the same. The target: with every
seed the mean reward of the scorecard's sampled replies rises, and held-out exact match falls by at most 3 points.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor

from benchmarks import harness
from benchmarks.harness import Figures, Measurements, Row
from benchmarks.pretrain import PROFILE, threads
from tasks.common.defaults import read_settings

__all__ = ["threads"]

PARALLEL_RUNS = 2
SEEDS = (1, 2, 3, 4, 5)
TUNED_METRICS = harness.ROOT / "metrics" / "evaluate@tuned.json"
REQUIRED_PATHS = (
    "data/finetune/chat/model", "data/validate/instructions", "data/tokenize/shards", "data/reward/train/model",
    "data/reward/judge/model", "data/evaluate/tuned/answers", "metrics/evaluate@tuned.json",
)  # fmt: skip


def check() -> None:
    """Raise BenchmarkError if the chain's outputs are missing."""
    harness.require_paths(*(harness.ROOT / path for path in REQUIRED_PATHS), remedy="run `bessemer run` first.")


def measure(*, trial: bool) -> Measurements:
    """Align with every seed, two runs in parallel because they are not timed."""
    seeds = SEEDS[:2] if trial else SEEDS
    with ThreadPoolExecutor(PARALLEL_RUNS) as pool:
        found = list(pool.map(lambda seed: run(seed, trial=trial), seeds))
    tuned: Figures = json.loads(TUNED_METRICS.read_text(encoding="utf-8"))
    return Measurements(list(rows(dict(zip(seeds, found, strict=True)), tuned)), notes(found))


def run(seed: int, *, trial: bool) -> Figures:
    """Align and evaluate once."""
    params = read_settings(PROFILE)
    align_settings, evaluate_settings = params["align"]["policy"], params["evaluate"]["policy"]
    if trial:
        align_settings["iterations"] = 2
    request = {"seed": seed, "align": align_settings, "evaluate": evaluate_settings, "numerics": params["numerics"]}
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        figures = harness.run_module("benchmarks.alignment_run", {**request, "scratch": scratch})
    summary = ", ".join(f"{name} {figures[name]}" for name in ("reward_mean", "exact_match_heldout", "kl_last"))
    print(f"    seed {seed}: {summary}", flush=True)
    return figures


def rows(results: dict[int, Figures], tuned: Figures) -> list[Row]:
    """Return each seed's figures beside the tuned model's, and the worst ones against the targets."""
    found = [
        Row(f"{what}, seed {seed}", figures[name], unit, tuned[name], "tuned model")
        for name, what, unit in (
            ("reward_mean", "mean reward", "rating points"),
            ("exact_match_heldout", "held-out questions", "share right"),
        )
        for seed, figures in results.items()
    ]  # fmt: skip
    gains = [figures["reward_mean"] - tuned["reward_mean"] for figures in results.values()]
    drops = [100 * (tuned["exact_match_heldout"] - figures["exact_match_heldout"]) for figures in results.values()]
    return [
        *found,
        Row("reward gained, the least of all seeds", min(gains), "rating points", target=">= 0.1"),
        Row("held-out exact match lost, the most of all seeds", round(max(drops), 2), "points", target="<= 3"),
    ]


def notes(found: list[Figures]) -> list[str]:
    """Return notes on the settings and the alarms."""
    rollbacks = [figures["rolled_back_to"] for figures in found if figures["rolled_back_to"] is not None]
    return [
        "The default profile's align section; questions and sampled replies are those of `evaluate@policy`.",
        f"Alarms were raised in {len(rollbacks)} of {len(found)} runs.",
    ]
