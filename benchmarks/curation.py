"""Near-duplicate removal: MB of text per second and core, and recall of planted near-duplicates.

Run as `make bench-curation` or `python -m benchmarks curation`, on all paragraphs of the default profile's speeches
with its settings. The planted near-duplicates are copies with 5 % of their words changed, dropped or appended; the
default profile's settings were tuned on these copies. The peer is datasketch's MinHash and MinHashLSH
(`benchmarks/curation_run.py`), with the same shingles, threshold and number of hash functions and its own choice of
bands; it is installed into a separate folder.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.data import ARCHIVES, PROFILE
from benchmarks.harness import BenchmarkError, Figures, Measurements, Row
from tasks.common.defaults import read_settings

PEER = "datasketch"
PEER_REQUIREMENT = "datasketch==2.0.0"
PEERS = harness.ROOT / "data" / ".cache" / "peers" / PEER_REQUIREMENT
TRIAL_PARAGRAPHS = 3000


def source() -> dict[str, Any]:
    """Return the default profile's source of speeches."""
    sources = read_settings(PROFILE)["ingest"]["sources"]
    return next(source for source in sources if source.get("reader") == "speeches")


def check() -> None:
    """Raise BenchmarkError if the speeches are missing or the peer cannot be installed."""
    remedy = "run `bessemer run -s ingest` under the default profile first."
    harness.require_paths(ARCHIVES / source()["sha256"], remedy=remedy)
    if not (PEERS / PEER).is_dir():
        command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(PEERS), PEER_REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"the peer {PEER_REQUIREMENT} could not be installed:\n{done.stderr[-2000:]}")


def threads() -> int:
    """Return 1: the figures are per core."""
    return 1


def measure(*, trial: bool) -> Measurements:
    """Run both sides in turn."""
    sides = {side: partial(search, side, trial=trial) for side in ("ours", "peer")}
    results = harness.alternate(sides, 1 if trial else 3)
    one = results["ours"][0]
    settings = read_settings(PROFILE)["validate"]["curate"]["near_duplicates"]
    notes = [
        f"text: {one['megabytes']:.2f} MB, {one['documents']:,} paragraphs, {one['planted']:,} of them planted; "
        + ", ".join(f"{name} {value}" for name, value in settings.items()),
        "recall of ours by the kind of change: "
        + ", ".join(f"{name} {share:.3f}" for name, share in one["recall_by_kind"].items()),
        "bands and rows of each: "
        + "; ".join(f"{side} {found[0]['bands']} of {found[0]['rows']}" for side, found in results.items()),
        "precision: the share of what is removed that has another paragraph at or above the threshold, counted exactly",
        harness.spread(results, "megabytes_per_second"),
    ]
    rows = [
        row("near-duplicate removal, from text to verdict", "megabytes_per_second", "MB/s per core", ">= 2", results),
        row("planted near-duplicates found", "recall", "share", ">= 0.95", results),
        row("removed paragraphs that are near-duplicates", "precision", "share", None, results),
    ]
    return Measurements(rows, notes)


def search(side: str, *, trial: bool) -> Figures:
    """Run one side in a subprocess; return recall, precision and speed."""
    path = ARCHIVES / source()["sha256"]
    (archive,) = path.iterdir() if path.is_dir() else (path,)
    settings = read_settings(PROFILE)["validate"]["curate"]["near_duplicates"]
    request = {
        "side": side, "archive": str(archive), "members": source()["members"], "settings": settings,
        "paragraphs": TRIAL_PARAGRAPHS if trial else None, "peers": str(Path(PEERS)),
    }  # fmt: skip
    return harness.run_module("benchmarks.curation_run", request)


def row(what: str, figure: str, unit: str, target: str | None, results: dict[str, list[Figures]]) -> Row:
    """Return the medians of a figure."""
    ours, peer = (harness.median(results[side], figure) for side in ("ours", "peer"))
    return Row(what, ours, unit, peer, PEER, target)
