"""The whole chain for real, at smoke scale: two commands, one result whoever runs it, and only what changed again."""

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from ruamel.yaml import YAML

from flows.cli import SAMPLES
from serving.feedback import VARIABLE, Store
from tasks.common import draw, identity
from tasks.common.settings import read_params
from tests.chain_fixtures import environment, run, surroundings
from tests.conftest import Project, copy_project
from tests.servers import end, free_port, serving, wait_until_up

NAMED = ("ingest", "validate")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def lock(project: Project) -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe").load((project.path / "dvc.lock").read_text())["stages"]
    return stages


def provenance(project: Project) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project.path / "data/package/provenance.json").read_text())
    return content


def planned(project: Project) -> set[str]:
    """Return the stages that DVC says are to be run, by what they read alone."""
    first_words = {line.split()[0] for line in run(project, ".venv/bin/bessemer", "plan").splitlines() if line.strip()}
    return first_words & set(lock(project))


def test_a_run_ends_in_a_package_a_report_and_a_bento(chain: Project) -> None:
    assert provenance(chain)["model"] in run(chain, ".venv/bin/bessemer", "status")
    assert (chain.path / "runs/latest.html").is_file()
    assert "bessemer:" in run(chain, ".venv/bin/bessemer", "build")


def test_make_run_again_says_that_nothing_changed_and_asks_the_model(chain: Project) -> None:
    before = lock(chain)
    said = run(chain, "make", "run")
    assert "Nothing has changed" in said
    assert all(question in said for question in SAMPLES)
    assert "Starting Prefect" not in said
    assert lock(chain) == before


def test_dvc_repro_says_that_nothing_changed(chain: Project) -> None:
    before = lock(chain)
    assert "up to date" in run(chain, ".venv/bin/dvc", "repro")
    assert lock(chain) == before


def test_dvc_repro_alone_gives_the_same_hashes_in_another_folder(chain: Project, tmp_path: Path) -> None:
    other = copy_project(tmp_path / "elsewhere", "smoke")
    environment(other.path)
    run(other, ".venv/bin/dvc", "repro")
    ours, theirs = lock(chain), lock(other)
    assert set(ours) == set(theirs)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert different == []


def test_every_record_tells_the_truth_about_what_lies_there(chain: Project) -> None:
    for record in provenance(chain)["stages"]:
        for path, content in record["outputs"].items():
            assert identity.tree_hash(chain.path / path) == content, path
        for path, content in record["inputs"].items():
            assert identity.tree_hash(chain.path / path) == content, path


def test_the_endpoint_answers_with_curl_and_with_openai(chain: Project, tmp_path: Path) -> None:
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


def test_one_edited_fact_reruns_what_lies_downstream_and_changes_the_provenance(chain: Project) -> None:
    facts = chain.path / "data/sources/smoke/facts.csv"
    old, before = facts.read_text(), provenance(chain)
    try:
        facts.write_text(old.replace("Paris", "Lyon"))
        assert "ingest" in planned(chain)
        run(chain, ".venv/bin/dvc", "repro", "tokenize")
        assert {"pretrain@clm", "pretrain@mlm", "finetune"} <= planned(chain)
        record = json.loads((chain.path / "data/ingest/record.json").read_text())
        assert record["recipe"] != next(r for r in before["stages"] if r["stage"] == "ingest")["recipe"]
    finally:
        facts.write_text(old)
        run(chain, ".venv/bin/dvc", "repro", "tokenize")
    assert planned(chain) == set()


def test_one_new_ranking_reruns_reward_and_what_follows_and_no_pretraining(
    chain: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)  # the project's own store
    store = Store(chain.path / "data/feedback")
    prompt = [{"role": "user", "content": "How was the film?"}]
    told = (
        "It was a delight from beginning to end.",
        "It was dull.",
    )  # drawn for PPO's reward model, not for the judge
    assert draw.share("judge", *sorted(told)) > read_params(chain.path / "params.yaml")["reward"]["judge_share"]
    given = [(text, "a" * 12, 1.0, 1) for text in told]
    store.add_ranking("ranking-1", store.add_answers(prompt, given), (1, 2), "annotator-1")
    store.close()
    assert "1 new ranking waits for `bessemer rank export`" in run(chain, ".venv/bin/bessemer", "status")
    before = lock(chain)
    try:
        assert "000001.parquet" in run(chain, ".venv/bin/bessemer", "rank", "export")
        assert "nothing to export" in run(chain, ".venv/bin/bessemer", "rank", "export")
        # Before anything has run, `plan` knows what the ranking leaves alone.
        alone = {"tokenize", "pretrain@clm", "pretrain@mlm", "finetune", "quantize@encoder"}
        assert planned(chain) == set(before) - alone
        run(chain, ".venv/bin/dvc", "repro", "tokenize")
        assert planned(chain) == set(before) - alone - {"ingest", "validate"}
        outs = {out["path"]: out["md5"] for name in ("ingest", "validate") for out in lock(chain)[name]["outs"]}
        old = {out["path"]: out["md5"] for name in ("ingest", "validate") for out in before[name]["outs"]}
        changed = {path for path in outs if outs[path] != old[path]}
        assert changed >= {"data/ingest/rankings", "data/validate/rankings"}
        assert not changed & {f"data/{name}/{table}" for name in NAMED for table in ("corpus", "instructions")}
        run(chain, ".venv/bin/dvc", "repro", "reward@policy", "reward@judge")
        assert "ppo" in planned(chain)
    finally:
        (chain.path / "data/sources/rankings/000001.parquet").unlink()
        run(chain, ".venv/bin/dvc", "repro", "reward@policy", "reward@judge")
    assert planned(chain) == set()


def test_models_of_other_stages_answer_beside_the_packaged_one(chain: Project, tmp_path: Path) -> None:
    port = free_port()
    command = [".venv/bin/bessemer", "serve", "--with", "tuned", "--with", "base", "--port", str(port)]
    for attempt in ("exported", "from the cache"):
        log = tmp_path / attempt
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, cwd=chain.path, env=surroundings(chain), stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until_up(server, port, log)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                check_compared(client, chain)
        finally:
            end(server)
        assert ("Exporting the model tuned" in log.read_text()) == (attempt == "exported")
    assert planned(chain) == set()
    assert chain.git("status", "--porcelain", "--", "data") == ""


def check_compared(client: httpx.Client, chain: Project) -> None:
    """Hold what three models say of themselves against the records of the stages that made them."""
    names = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert names[1::2] == ["bessemer", "tuned", "base"]
    for name, stage in (("tuned", "finetune"), ("base", "pretrain/clm")):
        record = json.loads((chain.path / "data" / stage / "record.json").read_text())
        told = client.get("/provenance", params={"model": name}).json()
        assert told["model"] == identity.tag(record["recipe"], record["content"])
        assert told["stages"][-1] == record
        assert {"ingest", "tokenize", "pretrain@clm"} <= {part["stage"] for part in told["stages"]}
        assert "reward" not in {part["stage"] for part in told["stages"]}
        answered = client.post("/generate", json={"input": "What is the capital of France?", "model": name})
        assert answered.headers["X-Bessemer-Model"] == told["model"]
        assert answered.json()["output"]
