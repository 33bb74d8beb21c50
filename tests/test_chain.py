"""The whole chain for real, at smoke scale: two commands, one result whoever runs it, and only what changed again."""

import json
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai import OpenAI
from ruamel.yaml import YAML

from tasks.common import identity, tables
from tests.chain_fixtures import clone, run, smoke
from tests.conftest import Project
from tests.servers import free_port, serving

__all__ = ["smoke"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def lock(project: Project) -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe").load((project.path / "dvc.lock").read_text())["stages"]
    return stages


def provenance(project: Project) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project.path / "data/package/provenance.json").read_text())
    return content


def planned(project: Project) -> set[str]:
    """Return the stages that DVC says are to be run, by what they read alone."""
    out = run(project, ".venv/bin/bessemer", "plan").stdout
    return {line.split()[0] for line in out.splitlines() if line.split() and line.split()[0] in lock(project)}


def test_make_run_ends_in_answers_a_report_and_a_bento(smoke: Project) -> None:
    said = (smoke.path / "runs/make-run.txt").read_text()
    assert "What is the capital of France?" in said
    assert (smoke.path / "runs/latest.html").is_file()
    assert provenance(smoke)["model"] in run(smoke, ".venv/bin/bessemer", "status").stdout
    assert len(list((smoke.path / "runs").glob("run-*"))) == 1


def test_make_run_again_says_that_nothing_changed(smoke: Project) -> None:
    before = lock(smoke)
    done = run(smoke, ".venv/bin/bessemer", "run")
    assert "up to date" in done.stdout
    assert "Starting Prefect" not in done.stdout
    assert lock(smoke) == before


def test_dvc_repro_says_that_nothing_changed(smoke: Project) -> None:
    before = lock(smoke)
    assert "up to date" in run(smoke, ".venv/bin/dvc", "repro").stdout
    assert lock(smoke) == before


def test_dvc_repro_alone_gives_the_same_hashes_in_another_folder(smoke: Project, tmp_path: Path) -> None:
    other = clone(tmp_path / "elsewhere")
    run(other, ".venv/bin/dvc", "repro")
    ours, theirs = lock(smoke), lock(other)
    assert set(ours) == set(theirs)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert different == []


def test_every_record_tells_the_truth_about_what_lies_there(smoke: Project) -> None:
    for record in provenance(smoke)["stages"]:
        for path, content in record["outputs"].items():
            assert identity.tree_hash(smoke.path / path) == content, path
        for path, content in record["inputs"].items():
            assert identity.tree_hash(smoke.path / path) == content, path


def test_the_endpoint_answers_with_curl_and_with_openai(smoke: Project, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving("serving.serve", str(port), package=smoke.path / "data/package", port=port, log=tmp_path / "log"):
        answer = httpx.post(f"{url}/generate", json={"input": "What is the capital of France?"}, timeout=60)
        assert answer.status_code == 200
        assert isinstance(answer.json()["output"], str)
        names = httpx.post(f"{url}/fill-mask", json={"input": "The capital of [MASK] is Paris."}, timeout=60)
        assert names.status_code == 200
        assert httpx.get(f"{url}/provenance", timeout=60).json()["model"] == provenance(smoke)["model"]
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        reply = client.chat.completions.create(
            model="bessemer", messages=[{"role": "user", "content": "What is the capital of France?"}]
        )
        assert reply.choices[0].message.content == answer.json()["output"]


def test_one_edited_fact_reruns_what_lies_downstream_and_changes_the_provenance(smoke: Project) -> None:
    facts = smoke.path / "data/sources/smoke/facts.csv"
    old, before = facts.read_text(), provenance(smoke)
    try:
        facts.write_text(old.replace("Paris", "Lyon"))
        assert "ingest" in planned(smoke)
        run(smoke, ".venv/bin/dvc", "repro", "tokenize")
        changed = {name for name in lock(smoke) if name in planned(smoke)}
        assert {"pretrain@clm", "pretrain@mlm", "finetune"} <= changed
        record = json.loads((smoke.path / "data/ingest/record.json").read_text())
        assert record["recipe"] != next(r for r in before["stages"] if r["stage"] == "ingest")["recipe"]
    finally:
        facts.write_text(old)
        run(smoke, ".venv/bin/dvc", "repro", "tokenize")
    assert planned(smoke) == set()


def test_one_new_ranking_reruns_reward_and_what_follows_and_no_pretraining(smoke: Project) -> None:
    folder = smoke.path / "data/sources/rankings"
    row = {
        "id": "by-hand-1",
        "prompt": [{"role": "user", "content": "Tell me a joke."}],
        "responses": ["I would, but it was all about countries.", "No."],
        "ranks": [1, 2], "scores": None, "scale": None, "annotators": 1, "models": ["a", "b"], "source": "people",
        "split": "train",
    }  # fmt: skip
    table = pa.Table.from_pylist([row], tables.schema("rankings"))
    pq.write_table(table, folder / "00001.parquet")
    try:
        run(smoke, ".venv/bin/dvc", "repro", "tokenize")
        to_run = planned(smoke)
        assert "reward" in to_run
        assert not {name for name in to_run if name.startswith(("pretrain", "finetune", "tokenize"))}
        run(smoke, ".venv/bin/dvc", "repro", "reward")
        assert "ppo" in planned(smoke)
    finally:
        (folder / "00001.parquet").unlink()
        run(smoke, ".venv/bin/dvc", "repro", "reward")
    assert planned(smoke) == set()
