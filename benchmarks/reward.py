"""The reward model on arguments of topics that it has not read, and listwise against pairwise losses.

Run as `BESSEMER_BENCH_DATA=FOLDER python -m benchmarks reward`, in a project in which `dvc repro pretrain@mlm` is
through. The folder holds `ukp_convarg/pairs.jsonl` (UKPConvArg1 Strict, Habernal & Gurevych 2016,
https://github.com/UKPLab/acl2016-convincing-arguments, as JSON lines of `id`, `topic`, `stance`, `chosen`, `rejected`).
Its topics are dealt out into folds; of each fold's topics nothing is learnt. A head is put on SmolLM2-135M-Instruct,
frozen, which is fetched as the profile smollm2 has it. The rated sentences are the chain's own, as rankings of four of
which the losses are told the order alone; these models start from the default profile's encoder.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Figures, Measured, Row
from benchmarks.medquad import VARIABLE
from benchmarks.pretrain import PROFILE
from tasks.common import draw
from tasks.common.modelling import lexicon
from tasks.common.settings import read_params

PAIRS = "ukp_convarg/pairs.jsonl"
NEEDED = ("data/pretrain/mlm/model", "data/validate/rankings")
FOLDS = 4
SIDE_BY_SIDE = 2
STEPS = {"arguments": 1500, "rated": 400}
# The blocks were chosen on each fold's training topics, rate, decay and steps on those of the folds 1 to 3: fold 0 took
# no part, and has a row of its own (docs/decisions.md).
HEAD = {
    "model": "data/ingest/checkpoint", "method": {"name": "head", "layers": 20, "pooling": "mean"}, "words": False,
    "max_tokens": 256, "word_dropout": 0.0, "batch": 64,
}  # fmt: skip
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 10.0}
NUMERICS = {"dtype": {"decoder": "float32", "encoder": "float32"}, "attention": "sdpa"}
CHECKPOINT = harness.ROOT / "profiles" / "smollm2.yaml"
PENALTIES = (30.0, 100.0, 300.0, 1000.0, 3000.0)  # of the bag of words; the best one on the held-out pairs counts
RESAMPLES = 2000
LOSSES: dict[str, dict[str, Any]] = {
    "pairwise": {"name": "bradley_terry", "weight": 1.0, "margin": 0.0},
    "listwise": {"name": "plackett_luce", "weight": 1.0},
}
Right = npt.NDArray[np.bool_]  # of each pair, whether it is in people's order
Pair = Mapping[str, Any]


def check() -> None:
    """Raise BenchmarkError where the data, or the encoder, is not at hand."""
    source()
    harness.needed(*(harness.ROOT / path for path in NEEDED), remedy="run `dvc repro pretrain@mlm` first.")


def source() -> Path:
    """Return the file of pairs; raise BenchmarkError where it is not at hand."""
    path = Path(os.environ.get(VARIABLE, ""), PAIRS)
    if VARIABLE not in os.environ or not path.exists():
        raise BenchmarkError(f"set {VARIABLE} to a folder that holds {PAIRS}.")
    return path.resolve()


def threads() -> int:
    """Return the threads that a stage computes with."""
    return int(read_params(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measured:
    """Cross-validate on arguments, and train once by each loss; two processes at a time: no speed is measured."""
    pairs = [json.loads(line) for line in source().read_text(encoding="utf-8").splitlines()][:: 100 if trial else 1]
    topics = sorted({pair["topic"] for pair in pairs})
    folds = {topic: number % FOLDS for number, topic in enumerate(topics)}
    asked = {"arguments": arguments(pairs, folds, trial=trial)}
    asked |= {name: rated(loss, trial=trial) for name, loss in LOSSES.items()}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = dict(zip(asked, pool.map(run, asked, asked.values()), strict=True))
    scores = dict(found["arguments"]["scores"])
    ours = np.array([scores[pair["chosen"]] > scores[pair["rejected"]] for pair in pairs])
    peers = {"length": np.array([len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs])}
    peers |= bags_of_words(pairs, folds)
    minutes = found["arguments"]["processor_minutes"]
    return Measured(
        [
            *argument_rows(pairs, ours, peers),
            untouched_row(pairs, folds, ours, peers),
            Row("the same: processor time of all folds", minutes, "minutes", target="<= 30"),
            *loss_rows({name: found[name]["metrics"] for name in LOSSES}),
        ],
        notes(pairs, scores, ours, peers, trial=trial),
    )


def run(name: str, request: dict[str, Any]) -> Figures:
    """Train one reward model in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        figures = harness.in_process("benchmarks.reward_run", {**request, "scratch": scratch}, timeout=7200)
    print(f"    {name}: done", flush=True)
    return figures


def arguments(pairs: Sequence[Pair], folds: Mapping[str, int], *, trial: bool) -> dict[str, Any]:
    """Return what is asked of a process that, fold by fold, learns the pairs of all others."""
    made = settings({**HEAD, "ordering": LOSSES["pairwise"], "rating": 0.0}, 3 if trial else STEPS["arguments"])
    made["reward"]["optimizer"] |= OPTIMIZER
    made["numerics"] |= NUMERICS
    rows, numbers = [ranking(pair) for pair in pairs], [folds[pair["topic"]] for pair in pairs]
    return {**made, "rows": rows, "folds": numbers, "checkpoint": read_params(CHECKPOINT)["ingest"]["checkpoint"]}


def ranking(pair: Pair) -> dict[str, Any]:
    """Return a pair as a row of the ranking table, the better one at a place drawn by its id."""
    first = draw.share("order", pair["id"]) < 0.5
    texts = [pair["chosen"], pair["rejected"]]
    return {
        "id": pair["id"], "prompt": [{"role": "user", "content": f"{pair['topic']}: {pair['stance']}"}],
        "responses": texts if first else texts[::-1], "ranks": [1, 2] if first else [2, 1], "scores": None,
        "scale": None, "annotators": 5, "models": [], "source": "ukp_convarg", "split": "train",
    }  # fmt: skip


def rated(loss: dict[str, Any], *, trial: bool) -> dict[str, Any]:
    """Return what is asked of a process that learns the order of four rated sentences by one loss."""
    changes = {"rating": 0.0, "ordering": loss, "words": False}
    return settings(changes, 3 if trial else STEPS["rated"]) | {"rows": None}


def settings(changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return the default profile's reward model with these changes, trained on all rankings there are."""
    params = read_params(PROFILE)
    reward = {**params["reward"], **changes, "steps": steps, "judge_share": 1e-9}
    return {"reward": reward, "numerics": params["numerics"]}


def bags_of_words(pairs: Sequence[Pair], folds: Mapping[str, int]) -> dict[str, Right]:
    """Return for each penalty what a ridge regression on the words of the other folds' pairs puts in order."""
    numbers = sorted({folds[pair["topic"]] for pair in pairs})
    words = {text: set(lexicon.terms(text)) for pair in pairs for text in (pair["chosen"], pair["rejected"])}
    result = {}
    for penalty in PENALTIES:
        weights = {
            fold: fit([pair for pair in pairs if folds[pair["topic"]] != fold], words, penalty) for fold in numbers
        }
        told = [
            [sum(weights[folds[pair["topic"]]].get(word, 0.0) for word in words[pair[side]]) for pair in pairs]
            for side in ("chosen", "rejected")
        ]
        result[f"bag of words, penalty {penalty:g}"] = np.greater(*map(np.array, told))
    return result


def fit(pairs: Sequence[Pair], words: Mapping[str, set[str]], penalty: float) -> dict[str, float]:
    """Return what each word adds to an argument: least squares on a distance of 1 in every pair."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import lsqr

    columns: dict[str, int] = {}
    cells: list[tuple[int, int, float]] = []
    for number, pair in enumerate(pairs):
        better, worse = words[pair["chosen"]], words[pair["rejected"]]
        cells += [
            (number, columns.setdefault(word, len(columns)), 1.0 if word in better else -1.0)
            for word in sorted(better ^ worse)
        ]
    places, values = np.array([cell[:2] for cell in cells]).T, [cell[2] for cell in cells]
    table = csr_matrix((values, places), shape=(len(pairs), len(columns)))
    found = lsqr(table, np.ones(len(pairs)), damp=penalty**0.5, iter_lim=100)[0]
    return dict(zip(columns, found.tolist(), strict=True))


def argument_rows(pairs: Sequence[Pair], ours: Right, peers: Mapping[str, Right]) -> list[Row]:
    """Return accuracy beside the best peer's, and the lower end of the difference's interval."""
    best = max(peers, key=lambda name: float(peers[name].mean()))
    low, high = interval([pair["topic"] for pair in pairs], ours.astype(float) - peers[best])
    what = f"more convincing argument of {len(pairs):,} pairs of topics never read"
    gained = float(ours.mean() - peers[best].mean())
    return [
        Row(what, float(ours.mean()), "share right", float(peers[best].mean()), best),
        Row("the same: share gained on the best peer", gained, "share", target=">= 0.03"),
        Row("the same: lower end of its 95 % interval, topics resampled", low, "share", target=">= 0"),
        Row("the same: upper end", high, "share"),
    ]


def untouched_row(pairs: Sequence[Pair], folds: Mapping[str, int], ours: Right, peers: Mapping[str, Right]) -> Row:
    """Return accuracy on the fold whose topics had no part in the choice of any setting, beside its best peer's."""
    part = np.array([folds[pair["topic"]] == 0 for pair in pairs])
    best = max(peers, key=lambda name: float(peers[name][part].mean()))
    what = f"the same on the {part.sum():,} pairs of topics on which no setting was chosen"
    return Row(what, float(ours[part].mean()), "share right", float(peers[best][part].mean()), best)


def interval(topics: Sequence[str], differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean difference, whole topics drawn."""
    order = np.argsort(np.array(topics), kind="stable")
    names, starts = np.unique(np.array(topics)[order], return_index=True)
    parts = [differences[order][a:b] for a, b in pairwise([*starts.tolist(), len(topics)])]
    sums = np.array([[part.sum(), len(part)] for part in parts])
    chosen = np.random.default_rng(1).integers(len(names), size=(RESAMPLES, len(names)))
    totals = sums[chosen].sum(axis=1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)


def loss_rows(found: Mapping[str, Figures]) -> list[Row]:
    """Return what a reward model that was told the order alone puts in order, by either loss."""
    return [
        Row(
            f"listwise loss on orders of four, {found['listwise'][gap]['pairs']:,} held-out pairs {gap[13:]} apart",
            found["listwise"][gap]["model"], "share right", found["pairwise"][gap]["model"], "pairwise loss",
        )
        for gap in ("gap_at_least_0.5", "gap_at_least_1", "gap_at_least_2")
    ]  # fmt: skip


def notes(
    pairs: Sequence[Pair], scores: Mapping[str, float], ours: Right, peers: Mapping[str, Right], *, trial: bool
) -> list[str]:
    """Say what was trained, what the peers do each, and what length has to do with it."""
    told = ", ".join(f"{name} {right.mean():.4f}" for name, right in peers.items())
    agreed = ours == peers["length"]
    lengths = [len(text) for text in scores]
    near = np.array([alike(len(pair["chosen"]), len(pair["rejected"])) for pair in pairs])
    best = max(peers, key=lambda name: float(peers[name].mean()))
    return [
        f"{len(pairs):,} pairs of {len(scores):,} different arguments on 16 topics, {FOLDS} folds of whole topics; "
        f"{3 if trial else STEPS['arguments']} steps of {HEAD['batch']} pairs, one seed. SmolLM2-135M-Instruct's "
        "lowest 20 of 30 blocks, frozen, worked out once for all folds; the head's numbers are averaged over tokens.",
        f"Peers: {told}; of the penalties the best one on the held-out pairs counts, which favours the peer.",
        f"Ours and length say the same of {agreed.mean():.4f} of the pairs; where they differ ours is right in "
        f"{ours[~agreed].mean():.4f}. Correlation of score and characters "
        f"{np.corrcoef(list(scores.values()), lengths)[0, 1]:.2f}. Of the {near.sum():,} pairs less than a fifth apart "
        f"in length ours has {ours[near].mean():.4f}, {best} {peers[best][near].mean():.4f}.",
        f"Listwise and pairwise: {3 if trial else STEPS['rated']} steps of the default profile's batch, without words "
        "and ratings; one seed each.",
    ]


def alike(one: int, other: int) -> bool:
    """Return whether two lengths are less than a fifth of the longer apart."""
    return abs(one - other) < max(one, other) / 5
