"""Profiles: what they promise, and their CPU-sized twins from text to a served answer."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.profile_twin import make_twin, read_profile, write_params
from tasks.common.params_file import check
from tasks.common.settings import ENTRY_SECTIONS, ENTRY_STAGES
from tests.conftest import ROOT, copy_project
from tests.foreign_fixtures import write_foreign
from tests.servers import free_port, serving
from tests.stage_processes import run_graph

NAMES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
GPU_PROFILES = ("gpu", "multi-gpu")
CHECKPOINT, FOLDER = "data/ingest/checkpoint", "models/mine"
SIZED_OR_PLACED = {"numerics", "placement", "ingest", "validate"}  # sections in which a twin may differ in structure


def outline(value: Any) -> Any:
    """Return settings without their numbers."""
    if isinstance(value, dict):
        return {name: outline(part) for name, part in value.items()}
    return [outline(part) for part in value] if isinstance(value, list) else None if type(value) is int else value


@pytest.mark.parametrize("name", NAMES)
def test_profile_is_short_and_begins_with_its_name(name: str) -> None:
    lines = (ROOT / "profiles" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# {name}: ")
    assert len(lines) <= 120 or name == "smoke"  # which writes small numbers of everything


@pytest.mark.parametrize("name", ["chat", *GPU_PROFILES])
def test_twin_has_the_graph_of_its_profile(name: str) -> None:
    profile = read_profile(name)
    twin = make_twin(profile)
    assert set(twin) == set(profile)
    assert {section: set(twin[section]) for section in ENTRY_SECTIONS} == {
        section: set(profile[section]) for section in ENTRY_SECTIONS
    }
    kept = set(profile) - SIZED_OR_PLACED
    found, wanted = ({section: outline(params[section]) for section in kept} for params in (twin, profile))
    assert found == {**wanted, "package": {**wanted["package"], "refuse_failed_gates": False}}
    assert twin["numerics"]["device"] == "cpu"
    check(twin)


def test_multi_gpu_profile_is_the_gpu_profile_with_processes() -> None:
    one, several = read_profile("gpu"), read_profile("multi-gpu")
    assert several["numerics"].pop("parallel") == {"processes": 2, "engine": "data"}
    assert several == one


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_gpu_profile_has_125_to_350_million_parameters(name: str) -> None:
    """A Llama with tied embeddings: attention, gated feed-forward layer and two norms a block, and a last norm."""
    profile = read_profile(name)
    shape, vocabulary = profile["pretrain"]["causal"]["model"], profile["tokenize"]["tokenizer"]["vocabulary"]
    hidden = shape["hidden"]
    block = 4 * hidden**2 + 3 * hidden * shape["feed_forward"] + 2 * hidden
    millions = (shape["layers"] * block + hidden + vocabulary * hidden) / 1e6
    assert 125 <= millions <= 350
    assert f"with {millions:.0f} M parameters" in (ROOT / "profiles/gpu.yaml").read_text(encoding="utf-8")


def replaced(value: Any, old: str, new: str) -> Any:
    """Return settings with every path `old` replaced."""
    if isinstance(value, dict):
        return {name: replaced(part, old, new) for name, part in value.items()}
    return new if value == old else value


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what Great Expectations imports
@pytest.mark.parametrize("name", ["chat", *GPU_PROFILES])
def test_twin_runs_from_text_to_a_served_answer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = copy_project(tmp_path / "project", "smoke").path
    twin = make_twin(read_profile(name))
    twin["placement"]["tracking"] = {"to": []}  # DVCLive has a process of its own, which imports DVC
    if name == "chat":  # a random model in place of the one from the package index
        write_foreign(project / FOLDER, max_position_embeddings=256)
        twin = replaced(twin, CHECKPOINT, FOLDER) | {"ingest": {**twin["ingest"], "checkpoint": None}}
    write_params(project / "params.yaml", twin)
    monkeypatch.chdir(project)
    assert run_graph(project)[-1] == "package"
    port = free_port()
    with (
        serving("serving.serve", str(port), package=project / "data/package", port=port, log=tmp_path / "log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        response = client.post("/generate", json={"input": "What is the capital of France?"})
        assert response.status_code == 200
        made = {record["stage"] for record in client.get("/provenance").json()["stages"]}
    stages = {f"{stage}@{entry}" for stage in ENTRY_STAGES for entry in twin[stage]}
    assert made >= stages - {"reward@judge"}  # no model is made from it
