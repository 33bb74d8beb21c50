"""Whether PPO learns with every seed: the default profile's tuned model aligned five times, each before the same sheet.

Run as `make bench-seeds` or `python -m benchmarks seeds`, in a project in which `bessemer run` is through. Another seed
draws other prompts, replies and minibatches; tuned model and reward model stay. The target is that the mean reward of
the sheet's sampled replies rises with every seed, and that held-out exact match falls by 3 points at most with each.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor

from benchmarks import harness
from benchmarks.harness import Figures, Measured, Row
from benchmarks.pretrain import PROFILE, threads
from tasks.common.settings import read_params

__all__ = ["threads"]

SIDE_BY_SIDE = 2
SEEDS = (1, 2, 3, 4, 5)
TUNED = harness.ROOT / "metrics" / "evaluate@tuned.json"
NEEDED = (
    "data/finetune/model", "data/validate/instructions", "data/tokenize/shards", "data/reward/policy/model",
    "data/reward/judge/model", "data/evaluate/tuned/answers", "metrics/evaluate@tuned.json",
)  # fmt: skip


def check() -> None:
    """Raise BenchmarkError where the chain has not come so far."""
    harness.needed(*(harness.ROOT / path for path in NEEDED), remedy="run `bessemer run` first.")


def measure(*, trial: bool) -> Measured:
    """Align with every seed, two at a time: nothing here is timed."""
    seeds = SEEDS[:2] if trial else SEEDS
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = list(pool.map(lambda seed: run(seed, trial=trial), seeds))
    tuned: Figures = json.loads(TUNED.read_text(encoding="utf-8"))
    return Measured(list(rows(dict(zip(seeds, found, strict=True)), tuned)), notes(found))


def run(seed: int, *, trial: bool) -> Figures:
    """Align and evaluate once."""
    params = read_params(PROFILE)
    if trial:
        params["ppo"]["iterations"] = 2
    request = {"seed": seed, **{name: params[name] for name in ("ppo", "evaluate", "numerics")}}
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        figures = harness.in_process("benchmarks.alignment_run", {**request, "scratch": scratch})
    told = ", ".join(f"{name} {figures[name]}" for name in ("reward_mean", "exact_match_heldout", "kl_last"))
    print(f"    seed {seed}: {told}", flush=True)
    return figures


def rows(results: dict[int, Figures], tuned: Figures) -> list[Row]:
    """Return each seed's policy beside the tuned model, and the worst of all against the targets."""
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
    """Say what was done."""
    back = [figures["rolled_back_to"] for figures in found if figures["rolled_back_to"] is not None]
    return [
        "The default profile's ppo section; the sheet's questions and sampled replies are those of `evaluate@policy`.",
        f"Alarms went off in {len(back)} of {len(found)} runs.",
    ]
