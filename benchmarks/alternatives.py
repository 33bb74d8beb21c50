"""PPO, DPO, RLOO and GRPO on the same data, with one tuned model, reward model, questions, replies and scorecard.

Run as `make bench-alternatives` or `python -m benchmarks alternatives`, in a project where `bessemer run` has
finished. PPO has the default profile's settings; the others share its number of replies and updates, optimizer,
learning rate and pretraining term. RLOO and GRPO also share its KL coefficient; DPO has TRL's beta. `LOG.md` lists what
else was tried. The target is that each algorithm passes the chain's gates on alignment.
"""

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks import harness, seeds
from benchmarks.harness import Figures, Measurements, Row
from benchmarks.pretrain import PROFILE, threads
from tasks.common.defaults import read_settings

__all__ = ["threads"]

TUNED_METRICS = harness.ROOT / "metrics" / "evaluate@tuned.json"
GROUP_SETTINGS = {"epochs": 2, "generations": 4, "clip_range": 0.2}
ALGORITHMS: dict[str, dict[str, Any]] = {  # differences from the profile's alignment
    "ppo": {},
    "dpo": {
        "name": "dpo", "epochs": 4, "generations": 4, "loss": {"name": "sigmoid"},
        "beta": 0.1,
    },
    "rloo": {"name": "rloo", **GROUP_SETTINGS, "beta": 0.15, "normalize_advantages": True},
    "grpo": {"name": "grpo", **GROUP_SETTINGS, "beta": 0.15, "scale": "group", "loss": "dapo", "ratio": "token"},
}  # fmt: skip
COLUMNS = (  # figure, label, unit, whether the tuned model's scorecard has it
    ("reward_mean", "mean reward", "rating points", True),
    ("win_rate", "wins over the tuned model", "share, by the judge", False),
    ("exact_match_heldout", "held-out questions", "share right", True),
    ("distinct_2", "distinct word pairs", "share", True),
    ("kl_last", "KL to the tuned model", "nats a reply", False),
    ("length_last", "length of a reply", "tokens", False),
    ("seconds", "time of aligning", "s", False),
)


def check() -> None:
    """Raise BenchmarkError if the chain's outputs are missing."""
    seeds.check()


def measure(*, trial: bool) -> Measurements:
    """Align by each algorithm, one at a time because they are timed."""
    found = {name: run(name, trial=trial) for name in ALGORITHMS}
    tuned: Figures = json.loads(TUNED_METRICS.read_text(encoding="utf-8"))
    print(table(found, tuned), flush=True)
    return Measurements(rows(found, tuned), notes(found))


def settings(name: str, ppo: Mapping[str, Any]) -> dict[str, Any]:
    """Return a profile's alignment settings with another algorithm."""
    changed = dict(ppo)
    if ALGORITHMS[name]:
        changed["algorithm"] = {**ALGORITHMS[name], "ptx": ppo["algorithm"]["ptx"]}
    return changed


def run(name: str, *, trial: bool) -> Figures:
    """Align and evaluate once."""
    params = read_settings(PROFILE)
    align_settings = settings(name, params["align"]["policy"])
    if trial:
        align_settings["iterations"] = 2
    request = {
        "seed": params["base"]["seed"], "align": align_settings, "evaluate": params["evaluate"]["policy"],
        "numerics": params["numerics"],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        figures = harness.run_module("benchmarks.alignment_run", {**request, "scratch": scratch})
    summary = ", ".join(f"{figure} {figures[figure]}" for figure, *_ in COLUMNS)
    print(f"    {name}: {summary}", flush=True)
    return figures


def rows(found: Mapping[str, Figures], tuned: Figures) -> list[Row]:
    """Return each algorithm's figures beside the tuned model's, and the worst ones against the gates."""
    listed = [
        Row(f"{what}, {name.upper()}", figures[figure], unit, *((tuned[figure], "tuned model") if shared else ()))
        for figure, what, unit, shared in COLUMNS
        for name, figures in found.items()
    ]
    gains = [figures["reward_mean"] - tuned["reward_mean"] for figures in found.values()]
    drops = [100 * (tuned["exact_match_heldout"] - figures["exact_match_heldout"]) for figures in found.values()]
    distinct_ratios = [figures["distinct_2"] / tuned["distinct_2"] for figures in found.values()]
    return [
        *listed,
        Row("reward gained, the least of the four", min(gains), "rating points", target=">= 0.5"),
        Row("held-out exact match lost, the most of the four", round(max(drops), 2), "points", target="<= 3"),
        Row("distinct word pairs kept, the least of the four", min(distinct_ratios), "share", target=">= 0.7"),
    ]


def notes(found: Mapping[str, Figures]) -> list[str]:
    """Return notes: the settings, the confidence intervals of the win rates, and rollbacks by alarms."""
    intervals = ", ".join(
        f"{name.upper()} {100 * low:.1f}–{100 * high:.1f} %"
        for name, (low, high) in ((name, figures["win_rate_interval"]) for name, figures in found.items())
    )
    rollbacks = [f"{name.upper()} to {figures['rolled_back_to']}" for name, figures in found.items()
            if figures["rolled_back_to"] is not None]  # fmt: skip
    return [
        "One seed, the default profile's iterations, replies, pretraining term, alarms and scorecard; updates: "
        + ", ".join(f"{name.upper()} {figures['updates']}" for name, figures in found.items()) + ".",
        f"Wins over the tuned model, 95 % intervals: {intervals}.",
        f"Rolled back to an earlier iteration: {', '.join(rollbacks) or 'none'}.",
    ]  # fmt: skip


def table(found: Mapping[str, Figures], tuned: Figures) -> str:
    """Return one Markdown table of all algorithms."""
    lines = [
        "| | mean reward | wins over tuned | held-out right | distinct-2 | KL, nats | tokens a reply | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| tuned model | {tuned['reward_mean']:.2f} | | {100 * tuned['exact_match_heldout']:.1f} % | "
        f"{tuned['distinct_2']:.2f} | 0 | {next(iter(found.values()))['length_first']:.1f} | |",
    ]
    for name, figures in found.items():
        low, high = figures["win_rate_interval"]
        lines.append(
            f"| {name.upper()} | {figures['reward_mean']:.2f} | {100 * figures['win_rate']:.1f} % "
            f"({100 * low:.0f}–{100 * high:.0f}) | {100 * figures['exact_match_heldout']:.1f} % | "
            f"{figures['distinct_2']:.2f} | {figures['kl_last']:.2f} | {figures['length_last']:.1f} | "
            f"{figures['seconds']:.0f} |"
        )
    return "\n".join(lines)
