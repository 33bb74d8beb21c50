"""The reward model on arguments of unseen topics, and listwise against pairwise losses.

Run as `BESSEMER_BENCH_DATA=FOLDER python -m benchmarks reward`, in a project where `dvc repro pretrain@masked` has
finished. The folder contains `ukp_convarg/pairs.jsonl` (UKPConvArg1 Strict, Habernal & Gurevych 2016,
https://github.com/UKPLab/acl2016-convincing-arguments, as JSON lines of `id`, `topic`, `stance`, `chosen`, `rejected`).
The topics are split into folds for cross-validation: a model never trains on the topics of its held-out fold. It is a
head on frozen SmolLM2-135M-Instruct, downloaded as in the profile chat. The losses are compared on the chain's own
rated sentences, as rankings of four without their ratings; these models start from the default profile's encoder.
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
from benchmarks.harness import BenchmarkError, Figures, Measurements, Row
from benchmarks.medquad import DATA_VARIABLE
from benchmarks.pretrain import PROFILE
from tasks.common import stable_hash
from tasks.common.defaults import read_settings
from tasks.common.reward import lexicon

PAIRS = "ukp_convarg/pairs.jsonl"
REQUIRED_PATHS = ("data/pretrain/masked/model", "data/validate/rankings")
FOLDS = 4
PARALLEL_RUNS = 2
STEPS = {"arguments": 1500, "rated": 400}
# The number of layers was chosen on each fold's training topics; rate, decay and steps on those of folds 1 to 3. Fold 0
# had no part in them and has its own row (docs/explanation/alignment.md#encoder-alone).
HEAD = {
    "model": "data/ingest/checkpoint", "method": {"name": "head", "layers": 20, "pooling": "mean"}, "lexicon": False,
    "max_tokens": 256, "word_dropout": 0.0, "batch": 64,
}  # fmt: skip
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 10.0}
NUMERICS = {"dtype": {"decoder": "float32", "encoder": "float32"}, "attention": "sdpa"}
CHECKPOINT = harness.ROOT / "profiles" / "chat.yaml"
PENALTIES = (
    30.0,
    100.0,
    300.0,
    1000.0,
    3000.0,
)  # ridge penalties of the bag of words; the best one on the held-out pairs counts
RESAMPLES = 2000
LOSSES: dict[str, dict[str, Any]] = {
    "pairwise": {"name": "bradley_terry", "weight": 1.0, "margin": 0.0},
    "listwise": {"name": "plackett_luce", "weight": 1.0},
}
Correct = npt.NDArray[np.bool_]  # per pair: whether its order agrees with the annotators
Pair = Mapping[str, Any]


def check() -> None:
    """Raise BenchmarkError if the data or the encoder is missing."""
    source()
    harness.require_paths(
        *(harness.ROOT / path for path in REQUIRED_PATHS), remedy="run `dvc repro pretrain@masked` first."
    )


def source() -> Path:
    """Return the file of pairs; raise BenchmarkError if it is missing."""
    path = Path(os.environ.get(DATA_VARIABLE, ""), PAIRS)
    if DATA_VARIABLE not in os.environ or not path.exists():
        raise BenchmarkError(f"set {DATA_VARIABLE} to a folder that contains {PAIRS}.")
    return path.resolve()


def threads() -> int:
    """Return the number of threads of a stage."""
    return int(read_settings(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measurements:
    """Cross-validate on arguments, and train once with each loss; two runs in parallel because they are not timed."""
    pairs = [json.loads(line) for line in source().read_text(encoding="utf-8").splitlines()][:: 100 if trial else 1]
    topics = sorted({pair["topic"] for pair in pairs})
    folds = {topic: number % FOLDS for number, topic in enumerate(topics)}
    requests = {"arguments": arguments_request(pairs, folds, trial=trial)}
    requests |= {name: rated_request(loss, trial=trial) for name, loss in LOSSES.items()}
    with ThreadPoolExecutor(PARALLEL_RUNS) as pool:
        found = dict(zip(requests, pool.map(run, requests, requests.values()), strict=True))
    scores = dict(found["arguments"]["scores"])
    ours = np.array([scores[pair["chosen"]] > scores[pair["rejected"]] for pair in pairs])
    peers = {"length": np.array([len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs])}
    peers |= bags_of_words(pairs, folds)
    minutes = found["arguments"]["processor_minutes"]
    return Measurements(
        [
            *argument_rows(pairs, ours, peers),
            fold_0_row(pairs, folds, ours, peers),
            Row("the same: processor time of all folds", minutes, "minutes", target="<= 30"),
            *loss_rows({name: found[name]["metrics"] for name in LOSSES}),
        ],
        notes(pairs, scores, ours, peers, trial=trial),
    )


def run(name: str, request: dict[str, Any]) -> Figures:
    """Run one request in a subprocess."""
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        figures = harness.run_module("benchmarks.reward_run", {**request, "scratch": scratch}, timeout=7200)
    print(f"    {name}: done", flush=True)
    return figures


def arguments_request(pairs: Sequence[Pair], folds: Mapping[str, int], *, trial: bool) -> dict[str, Any]:
    """Return the request for a cross-validation: one model per fold, trained on the pairs of the other folds."""
    made = settings({**HEAD, "ordering": LOSSES["pairwise"], "mse_weight": 0.0}, 3 if trial else STEPS["arguments"])
    made["reward"]["optimizer"] |= OPTIMIZER
    made["numerics"] |= NUMERICS
    rows, numbers = [ranking(pair) for pair in pairs], [folds[pair["topic"]] for pair in pairs]
    return {**made, "rows": rows, "folds": numbers, "checkpoint": read_settings(CHECKPOINT)["ingest"]["checkpoint"]}


def ranking(pair: Pair) -> dict[str, Any]:
    """Return a pair as a row of the ranking table, in an order derived from its id."""
    first = stable_hash.uniform("order", pair["id"]) < 0.5
    texts = [pair["chosen"], pair["rejected"]]
    return {
        "id": pair["id"], "prompt": [{"role": "user", "content": f"{pair['topic']}: {pair['stance']}"}],
        "responses": texts if first else texts[::-1], "ranks": [1, 2] if first else [2, 1], "scores": None,
        "scale": None, "annotators": 5, "models": [], "source": "ukp_convarg", "split": "train",
    }  # fmt: skip


def rated_request(loss: dict[str, Any], *, trial: bool) -> dict[str, Any]:
    """Return the request for training on rankings of four rated sentences with one loss."""
    changes = {"mse_weight": 0.0, "ordering": loss, "lexicon": False}
    return settings(changes, 3 if trial else STEPS["rated"]) | {"rows": None}


def settings(changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return the default profile's reward settings with these changes, trained on all rankings."""
    params = read_settings(PROFILE)
    reward = {**params["reward"]["train"], **changes, "steps": steps, "judge_share": 1e-9}
    return {"reward": reward, "numerics": params["numerics"]}


def bags_of_words(pairs: Sequence[Pair], folds: Mapping[str, int]) -> dict[str, Correct]:
    """Return, per penalty, the pairs ordered correctly by a ridge regression on the words of the other folds."""
    numbers = sorted({folds[pair["topic"]] for pair in pairs})
    words = {text: set(lexicon.terms(text)) for pair in pairs for text in (pair["chosen"], pair["rejected"])}
    result = {}
    for penalty in PENALTIES:
        weights = {
            fold: fit([pair for pair in pairs if folds[pair["topic"]] != fold], words, penalty) for fold in numbers
        }
        sums = [
            [sum(weights[folds[pair["topic"]]].get(word, 0.0) for word in words[pair[side]]) for pair in pairs]
            for side in ("chosen", "rejected")
        ]
        result[f"bag of words, penalty {penalty:g}"] = np.greater(*map(np.array, sums))
    return result


def fit(pairs: Sequence[Pair], words: Mapping[str, set[str]], penalty: float) -> dict[str, float]:
    """Return the weight of each word: ridge regression of each pair's word difference on 1."""
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
    cells_at, values = np.array([cell[:2] for cell in cells]).T, [cell[2] for cell in cells]
    table = csr_matrix((values, cells_at), shape=(len(pairs), len(columns)))
    found = lsqr(table, np.ones(len(pairs)), damp=penalty**0.5, iter_lim=100)[0]
    return dict(zip(columns, found.tolist(), strict=True))


def argument_rows(pairs: Sequence[Pair], ours: Correct, peers: Mapping[str, Correct]) -> list[Row]:
    """Return the accuracy beside the best peer's, and the difference with its 95 % interval."""
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


def fold_0_row(pairs: Sequence[Pair], folds: Mapping[str, int], ours: Correct, peers: Mapping[str, Correct]) -> Row:
    """Return the accuracy on fold 0, on which no setting was chosen, beside that of its best peer."""
    part = np.array([folds[pair["topic"]] == 0 for pair in pairs])
    best = max(peers, key=lambda name: float(peers[name][part].mean()))
    what = f"the same on the {part.sum():,} pairs of topics on which no setting was chosen"
    return Row(what, float(ours[part].mean()), "share right", float(peers[best][part].mean()), best)


def interval(topics: Sequence[str], differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean difference, resampling whole topics."""
    order = np.argsort(np.array(topics), kind="stable")
    names, starts = np.unique(np.array(topics)[order], return_index=True)
    parts = [differences[order][a:b] for a, b in pairwise([*starts.tolist(), len(topics)])]
    sums = np.array([[part.sum(), len(part)] for part in parts])
    chosen = np.random.default_rng(1).integers(len(names), size=(RESAMPLES, len(names)))
    totals = sums[chosen].sum(axis=1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)


def loss_rows(found: Mapping[str, Figures]) -> list[Row]:
    """Return the accuracy of the models trained on the order alone, by loss."""
    return [
        Row(
            f"listwise loss on orders of four, {found['listwise'][gap]['pairs']:,} held-out pairs {gap[13:]} apart",
            found["listwise"][gap]["model"], "share right", found["pairwise"][gap]["model"], "pairwise loss",
        )
        for gap in ("gap_at_least_0.5", "gap_at_least_1", "gap_at_least_2")
    ]  # fmt: skip


def notes(
    pairs: Sequence[Pair], scores: Mapping[str, float], ours: Correct, peers: Mapping[str, Correct], *, trial: bool
) -> list[str]:
    """Return notes on the training, the peers' accuracies, and the effect of length."""
    peer_accuracies = ", ".join(f"{name} {right.mean():.4f}" for name, right in peers.items())
    agrees_with_length = ours == peers["length"]
    lengths = [len(text) for text in scores]
    similar = np.array([similar_length(len(pair["chosen"]), len(pair["rejected"])) for pair in pairs])
    best = max(peers, key=lambda name: float(peers[name].mean()))
    return [
        f"{len(pairs):,} pairs of {len(scores):,} different arguments on 16 topics, {FOLDS} folds of whole topics; "
        f"{3 if trial else STEPS['arguments']} steps of {HEAD['batch']} pairs, one seed. SmolLM2-135M-Instruct's "
        "lowest 20 of 30 blocks, frozen, computed once for all folds; the head's outputs are averaged over tokens.",
        f"Peers: {peer_accuracies}; the penalty is the best one on the held-out pairs, which favours the peer.",
        f"Ours and length agree on {agrees_with_length.mean():.4f} of the pairs; where they differ ours is right in "
        f"{ours[~agrees_with_length].mean():.4f}. Correlation of score and characters "
        f"{np.corrcoef(list(scores.values()), lengths)[0, 1]:.2f}. On the {similar.sum():,} pairs of similar length "
        f"(less than a fifth apart) ours has {ours[similar].mean():.4f}, {best} {peers[best][similar].mean():.4f}.",
        f"Listwise and pairwise: {3 if trial else STEPS['rated']} steps of the default profile's batch, without words "
        "and ratings; one seed each.",
    ]


def similar_length(one: int, other: int) -> bool:
    """Return whether two lengths differ by less than a fifth of the longer one."""
    return abs(one - other) < max(one, other) / 5
