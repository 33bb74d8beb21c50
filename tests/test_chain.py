"""The whole chain at smoke scale: a complete run, the same hashes by `dvc repro`, and reruns of changed stages only."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from ruamel.yaml import YAML

from serving.feedback.store import FEEDBACK_VARIABLE, Store
from tasks.common import identity, stable_hash
from tasks.common.defaults import read_settings
from tests import forked_python
from tests.chain_fixtures import environment, make_venv, run
from tests.conftest import Project, copy_project
from tests.servers import free_port, serving, stop_server, wait_until_up

TABLE_STAGES = ("ingest", "validate")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def forked_stages(chain: Project, stage_forks: Path) -> Iterator[None]:
    """Fork the stages of DVC's reruns."""
    with forked_python.first_in_path(stage_forks):
        yield


def lock(project: Project) -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe").load((project.path / "dvc.lock").read_text())["stages"]
    return stages


def provenance(project: Project) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project.path / "data/package/provenance.json").read_text())
    return content


def stages_to_run(project: Project) -> set[str]:
    """Return the stages that `bessemer plan` lists as out of date."""
    first_words = {line.split()[0] for line in run(project, ".venv/bin/bessemer", "plan").splitlines() if line.strip()}
    return first_words & set(lock(project))


def test_run_makes_package_report_and_bento(chain: Project) -> None:
    assert provenance(chain)["model"] in run(chain, ".venv/bin/bessemer", "status")
    assert (chain.path / "runs/latest.html").is_file()
    assert "bessemer:" in run(chain, ".venv/bin/bessemer", "build")


def test_run_connects_to_no_other_machine(smoke: Project) -> None:
    """Flow, stages, servers and their libraries are checked, without variables that disable telemetry."""
    record = smoke.path.with_name("smoke-connections")
    assert not record.exists(), record.read_text()


def test_make_run_twice_changes_nothing_and_samples_the_model(chain: Project) -> None:
    before = lock(chain)
    output = run(chain, "make", "run")
    assert "Nothing has changed" in output
    examples = json.loads((chain.path / "data/package/examples.json").read_text())
    assert len(examples["samples"]) == 3
    assert all(f"> {question}" in output for question in examples["samples"])
    assert "Starting Prefect" not in output
    assert lock(chain) == before


def test_dvc_repro_after_run_is_up_to_date(chain: Project) -> None:
    before = lock(chain)
    assert "up to date" in run(chain, ".venv/bin/dvc", "repro")
    assert lock(chain) == before


def test_dvc_repro_in_another_folder_gives_the_same_hashes(chain: Project, tmp_path: Path) -> None:
    other = copy_project(tmp_path / "elsewhere", "smoke")
    make_venv(other.path)
    run(other, ".venv/bin/dvc", "repro")
    ours, theirs = lock(chain), lock(other)
    assert set(ours) == set(theirs)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert different == []


def test_records_match_files_on_disk(chain: Project) -> None:
    for record in provenance(chain)["stages"]:
        for path, content in record["outputs"].items():
            assert identity.tree_hash(chain.path / path) == content, path
        for path, content in record["inputs"].items():
            assert identity.tree_hash(chain.path / path) == content, path


def test_endpoint_answers_http_and_openai_clients(chain: Project, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving("serving.serve", str(port), package=chain.path / "data/package", port=port, log=tmp_path / "log"):
        answer = httpx.post(f"{url}/generate", json={"input": "What is the capital of France?"}, timeout=60)
        assert answer.status_code == 200
        assert isinstance(answer.json()["output"], str)
        names = httpx.post(f"{url}/fill-mask", json={"input": "The capital of [MASK] is Paris."}, timeout=60)
        assert names.status_code == 200
        assert httpx.get(f"{url}/provenance", timeout=60).json()["model"] == provenance(chain)["model"]
        with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            reply = client.chat.completions.create(
                model="bessemer", messages=[{"role": "user", "content": "What is the capital of France?"}]
            )
        assert reply.choices[0].message.content == answer.json()["output"]


def test_edited_fact_reruns_downstream_stages_and_changes_provenance(chain: Project) -> None:
    facts = chain.path / "data/sources/smoke/facts.csv"
    old, before = facts.read_text(), provenance(chain)
    try:
        facts.write_text(old.replace("Paris", "Lyon"))
        assert "ingest" in stages_to_run(chain)
        run(chain, ".venv/bin/dvc", "repro", "tokenize")
        assert {"pretrain@causal", "pretrain@masked", "finetune@chat"} <= stages_to_run(chain)
        record = json.loads((chain.path / "data/ingest/record.json").read_text())
        assert record["recipe"] != next(r for r in before["stages"] if r["stage"] == "ingest")["recipe"]
    finally:
        facts.write_text(old)
        run(chain, ".venv/bin/dvc", "repro", "tokenize")
    assert stages_to_run(chain) == set()


def test_new_ranking_reruns_reward_and_downstream_stages_only(chain: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FEEDBACK_VARIABLE, raising=False)  # the project's own store
    store = Store(chain.path / "data/feedback")
    prompt = [{"role": "user", "content": "How was the film?"}]
    texts = (
        "It was a delight from beginning to end.",
        "It was dull.",
    )  # drawn for PPO's reward model, not for the judge
    assert (
        stable_hash.uniform("judge", *sorted(texts))
        > read_settings(chain.path / "params.yaml")["reward"]["train"]["judge_share"]
    )
    answers = [(text, "a" * 12, 1.0, 1) for text in texts]
    store.add_ranking("ranking-1", store.add_answers(prompt, answers), (1, 2), "annotator-1")
    store.close()
    assert "1 new ranking waits for `bessemer rank export`" in run(chain, ".venv/bin/bessemer", "status")
    before = lock(chain)
    try:
        assert "000001.parquet" in run(chain, ".venv/bin/bessemer", "rank", "export")
        assert "No new rankings to export" in run(chain, ".venv/bin/bessemer", "rank", "export")
        # Before anything has run, `plan` lists only the stages that the ranking affects.
        unaffected = {"code", "tokenize", "pretrain@causal", "pretrain@masked", "finetune@chat", "quantize@encoder"}
        assert stages_to_run(chain) == set(before) - unaffected
        run(chain, ".venv/bin/dvc", "repro", "tokenize")
        assert stages_to_run(chain) == set(before) - unaffected - {"ingest", "validate"}
        outs = {out["path"]: out["md5"] for name in ("ingest", "validate") for out in lock(chain)[name]["outs"]}
        old = {out["path"]: out["md5"] for name in ("ingest", "validate") for out in before[name]["outs"]}
        changed = {path for path in outs if outs[path] != old[path]}
        assert changed >= {"data/ingest/rankings", "data/validate/rankings"}
        assert not changed & {f"data/{name}/{table}" for name in TABLE_STAGES for table in ("corpus", "instructions")}
        run(chain, ".venv/bin/dvc", "repro", "reward@train", "reward@judge")
        assert "align@policy" in stages_to_run(chain)
    finally:
        (chain.path / "data/sources/rankings/000001.parquet").unlink()
        run(chain, ".venv/bin/dvc", "repro", "reward@train", "reward@judge")
    assert stages_to_run(chain) == set()


def test_serve_with_models_of_other_stages(chain: Project, tmp_path: Path) -> None:
    port = free_port()
    command = [".venv/bin/bessemer", "serve", "--with", "tuned", "--with", "base", "--port", str(port)]
    for attempt in ("exported", "from the cache"):
        log = tmp_path / attempt
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, cwd=chain.path, env=environment(chain), stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until_up(server, port, log)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                check_compared(client, chain)
        finally:
            stop_server(server)
        assert ("Exporting the model tuned" in log.read_text()) == (attempt == "exported")
    assert stages_to_run(chain) == set()
    assert chain.git("status", "--porcelain", "--", "data") == ""


def check_compared(client: httpx.Client, chain: Project) -> None:
    """Check names, provenance and answers of three models against the records of their stages."""
    names = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert names[1::2] == ["bessemer", "tuned", "base"]
    for name, stage in (("tuned", "finetune/chat"), ("base", "pretrain/causal")):
        record = json.loads((chain.path / "data" / stage / "record.json").read_text())
        model_provenance = client.get("/provenance", params={"model": name}).json()
        assert model_provenance["model"] == identity.tag(record["recipe"], record["content"])
        assert model_provenance["stages"][-1] == record
        assert {"ingest", "tokenize", "pretrain@causal"} <= {part["stage"] for part in model_provenance["stages"]}
        assert "reward@train" not in {part["stage"] for part in model_provenance["stages"]}
        response = client.post("/generate", json={"input": "What is the capital of France?", "model": name})
        assert response.headers["X-Bessemer-Model"] == model_provenance["model"]
        assert response.json()["output"]
