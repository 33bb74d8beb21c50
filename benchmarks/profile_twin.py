"""The CPU-sized twin of a profile: the same graph, with its sizes, its data and its device changed and nothing else.

Tests run the twins where there is no GPU, and `--trial` of `benchmarks/gpu_profile.py` and
`benchmarks/multi_gpu_profile.py` does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from tasks.common.raw_params import read_params

PROFILES = ROOT / "profiles"
MAX_PROCESSES = 2
SIZES: dict[str, Any] = {  # of every setting of this name, wherever it is and whatever it was
    "vocabulary": 700, "context": 128, "hidden": 64, "layers": 2, "heads": 2, "feed_forward": 128, "window": 64,
    "batch": 8, "steps": 4, "heldout": 8, "max_new_tokens": 16, "questions": 4, "samples": 8, "iterations": 2,
    "episodes": 8, "minibatch": 4,
}  # fmt: skip
DATA = ("ingest", "validate")  # sections that say which data there are


def read_profile(name: str) -> dict[str, Any]:
    """Return a profile's settings as written."""
    return read_params(PROFILES / f"{name}.yaml")


def make_twin(params: dict[str, Any]) -> dict[str, Any]:
    """Return settings of the same graph that a CPU runs in a minute, on the data of `smoke` and the same checkpoint.

    Failed gates do not stop it: its models know nothing.
    """
    twin: dict[str, Any] = _resize(params)
    smoke = read_profile("smoke")
    twin |= {section: smoke[section] for section in DATA}
    twin["ingest"]["checkpoint"] = params["ingest"].get("checkpoint")
    twin["numerics"] |= {"device": "cpu", "threads": 1}
    parallel = twin["numerics"].get("parallel")
    if parallel:
        parallel["processes"] = min(parallel["processes"], MAX_PROCESSES)
    twin["package"]["refuse_failed_gates"] = False
    return twin


def _resize(value: Any, name: str = "") -> Any:
    """Return a setting, or a group of them, with the sizes in it replaced."""
    if isinstance(value, dict):
        return {key: _resize(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [_resize(part) for part in value]
    return SIZES[name] if name in SIZES and isinstance(value, int) else value


def write_params(path: Path, params: Mapping[str, Any]) -> None:
    """Write settings as YAML."""
    from ruamel.yaml import YAML

    with path.open("w", encoding="utf-8") as file:
        YAML().dump(dict(params), file)
