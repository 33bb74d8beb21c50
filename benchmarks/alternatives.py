"""PPO, DPO, RLOO and GRPO on the same data: one tuned model, reward model, questions, number of replies and sheet.

Run as `make bench-alternatives` or `python -m benchmarks alternatives`, in a project in which `bessemer run` is
through. PPO is the default profile's; the others take its replies, updates, optimizer, learning rate and pretraining
term; RLOO and GRPO its price of leaving the tuned model too, DPO TRL's. What else was tried stands in `LOG.md`. The
target is that each of them passes the chain's gates on what alignment must gain and may cost.
"""

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks import harness, seeds
from benchmarks.harness import Figures, Measured, Row
from benchmarks.pretrain import PROFILE, threads
from tasks.common.settings import read_params

__all__ = ["threads"]

TUNED = harness.ROOT / "metrics" / "evaluate@tuned.json"
GROUP = {"epochs": 2, "generations": 4, "clip": 0.2}
ALGORITHMS: dict[str, dict[str, Any]] = {  # what differs from the profile's ppo section
    "ppo": {},
    "dpo": {
        "name": "dpo", "epochs": 4, "pairs": {"name": "sampled", "generations": 4}, "loss": {"name": "sigmoid"},
        "beta": 0.1,
    },
    "rloo": {"name": "rloo", **GROUP, "beta": 0.15, "normalise": True},
    "grpo": {"name": "grpo", **GROUP, "beta": 0.15, "scale": "group", "loss": "dapo", "ratio": "token"},
}  # fmt: skip
COLUMNS = (  # figure, what it is called, its unit, and whether the tuned model's sheet has it
    ("reward_mean", "mean reward", "rating points", True),
    ("win_rate_over_tuned", "wins over the tuned model", "share, by the judge", False),
    ("exact_match_heldout", "held-out questions", "share right", True),
    ("distinct_2", "distinct word pairs", "share", True),
    ("kl_last", "KL to the tuned model", "nats a reply", False),
    ("length_last", "length of a reply", "tokens", False),
    ("seconds", "time of aligning", "s", False),
)


def check() -> None:
    """Raise BenchmarkError where the chain has not come so far."""
    seeds.check()


def measure(*, trial: bool) -> Measured:
    """Align by each algorithm in turn, by itself, for they are timed."""
    found = {name: run(name, trial=trial) for name in ALGORITHMS}
    tuned: Figures = json.loads(TUNED.read_text(encoding="utf-8"))
    print(table(found, tuned), flush=True)
    return Measured(rows(found, tuned), notes(found))


def settings(name: str, ppo: Mapping[str, Any]) -> dict[str, Any]:
    """Return a profile's ppo section with another algorithm in it."""
    changed = dict(ppo)
    if ALGORITHMS[name]:
        changed["algorithm"] = {**ALGORITHMS[name], "ptx": ppo["algorithm"]["ptx"]}
    return changed


def run(name: str, *, trial: bool) -> Figures:
    """Align and evaluate once."""
    params = read_params(PROFILE)
    params["ppo"] = settings(name, params["ppo"])
    if trial:
        params["ppo"]["iterations"] = 2
    request = {
        "seed": params["base"]["seed"], **{section: params[section] for section in ("ppo", "evaluate", "numerics")},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        figures = harness.in_process("benchmarks.alignment_run", {**request, "scratch": scratch})
    told = ", ".join(f"{figure} {figures[figure]}" for figure, *_ in COLUMNS)
    print(f"    {name}: {told}", flush=True)
    return figures


def rows(found: Mapping[str, Figures], tuned: Figures) -> list[Row]:
    """Return every algorithm's figures, the tuned model's beside them, and the worst against the gates."""
    listed = [
        Row(f"{what}, {name.upper()}", figures[figure], unit, *((tuned[figure], "tuned model") if shared else ()))
        for figure, what, unit, shared in COLUMNS
        for name, figures in found.items()
    ]
    gains = [figures["reward_mean"] - tuned["reward_mean"] for figures in found.values()]
    drops = [100 * (tuned["exact_match_heldout"] - figures["exact_match_heldout"]) for figures in found.values()]
    kept = [figures["distinct_2"] / tuned["distinct_2"] for figures in found.values()]
    return [
        *listed,
        Row("reward gained, the least of the four", min(gains), "rating points", target=">= 0.5"),
        Row("held-out exact match lost, the most of the four", round(max(drops), 2), "points", target="<= 3"),
        Row("distinct word pairs kept, the least of the four", min(kept), "share", target=">= 0.7"),
    ]


def notes(found: Mapping[str, Figures]) -> list[str]:
    """Say what was done, how sure the wins are, and where an alarm went off."""
    sure = ", ".join(
        f"{name.upper()} {100 * low:.1f}–{100 * high:.1f} %"
        for name, (low, high) in ((name, figures["win_rate_over_tuned_interval"]) for name, figures in found.items())
    )
    back = [f"{name.upper()} to {figures['rolled_back_to']}" for name, figures in found.items()
            if figures["rolled_back_to"] is not None]  # fmt: skip
    return [
        "One seed, the default profile's iterations, replies, pretraining term, alarms and sheet; updates: "
        + ", ".join(f"{name.upper()} {figures['updates']}" for name, figures in found.items()) + ".",
        f"Wins over the tuned model, 95 % intervals: {sure}.",
        f"Rolled back to an earlier iteration: {', '.join(back) or 'none'}.",
    ]  # fmt: skip


def table(found: Mapping[str, Figures], tuned: Figures) -> str:
    """Return one table of all, in Markdown."""
    lines = [
        "| | mean reward | wins over tuned | held-out right | distinct-2 | KL, nats | tokens a reply | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| tuned model | {tuned['reward_mean']:.2f} | | {100 * tuned['exact_match_heldout']:.1f} % | "
        f"{tuned['distinct_2']:.2f} | 0 | {next(iter(found.values()))['length_first']:.1f} | |",
    ]
    for name, figures in found.items():
        low, high = figures["win_rate_over_tuned_interval"]
        lines.append(
            f"| {name.upper()} | {figures['reward_mean']:.2f} | {100 * figures['win_rate_over_tuned']:.1f} % "
            f"({100 * low:.0f}–{100 * high:.0f}) | {100 * figures['exact_match_heldout']:.1f} % | "
            f"{figures['distinct_2']:.2f} | {figures['kl_last']:.2f} | {figures['length_last']:.1f} | "
            f"{figures['seconds']:.0f} |"
        )
    return "\n".join(lines)
