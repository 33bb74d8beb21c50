"""The Bento: made once, the same everywhere, anew when service or model change, without a network, and it answers."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
from ruamel.yaml import YAML

from serving import build, lock
from serving.package import open_package
from tests.servers import free_port, serving
from tests.serving_fixtures import ROOT, TAG, answer, package, question

__all__ = ["package"]


def make(package: Path, store: Path) -> str:
    """Run the build as a person would, where nothing can be downloaded; return what it prints."""
    nowhere = "http://127.0.0.1:9"
    offline = {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "serving.build"],
        cwd=ROOT,
        env={**os.environ, **offline, "BENTOML_HOME": str(store), "BESSEMER_PACKAGE": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def store(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of BentoML's with the package's Bento in it."""
    store = tmp_path_factory.mktemp("bentoml")
    assert "made" in make(package, store)
    return store


@pytest.fixture(scope="module")
def bento(store: Path) -> Path:
    [folder] = [path for path in (store / "bentos/bessemer").iterdir() if path.is_dir()]
    return folder


def content(bento: Path) -> dict[str, str]:
    """Return path -> hash of what a Bento holds, but for the file in which BentoML notes when it was made."""
    files = [path for path in bento.rglob("*") if path.is_file() and path.name != "bento.yaml"]
    return {str(path.relative_to(bento)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_is_named_after_its_content_and_its_model(bento: Path, package: Path) -> None:
    assert bento.name == build.version_of(open_package(package))
    described = YAML(typ="safe").load(bento / "bento.yaml")
    assert (described["name"], described["entry_service"]) == ("bessemer", "Bessemer")
    assert described["labels"]["model"] == TAG


def test_building_again_does_nothing_and_says_so(bento: Path, package: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bento.rglob("*")}
    printed = make(package, store)
    assert f"bessemer:{bento.name}: there already, nothing to do" in printed
    assert {path: path.stat().st_mtime_ns for path in bento.rglob("*")} == before


def test_another_machine_makes_the_same(bento: Path, package: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(package, elsewhere)
    make(elsewhere, tmp_path / "store")
    assert content(tmp_path / "store/bentos/bessemer" / bento.name) == content(bento)


def test_it_holds_the_service_and_the_package_and_nothing_else(bento: Path, package: Path) -> None:
    held = {path.relative_to(bento / "src") for path in (bento / "src").rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT) for path in build.service_files()} | {Path("bentofile.yaml")}
    expected |= {Path("data/package") / path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    assert held == expected


def test_links_into_a_cache_become_files(package: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    shutil.copytree(package, linked)
    (linked / "policy/model.onnx").unlink()
    (linked / "policy/model.onnx").symlink_to(package / "policy/model.onnx")
    make(linked, tmp_path / "store")
    [copied] = (tmp_path / "store").glob("bentos/bessemer/*/src/data/package/policy/model.onnx")
    assert not copied.is_symlink()
    assert copied.read_bytes() == (package / "policy/model.onnx").read_bytes()


def test_the_containers_file(bento: Path) -> None:
    lines = (bento / "env/docker/Dockerfile").read_text().splitlines()
    assert "FROM python:3.11-slim AS base-container" in lines
    assert any("pip install -r $BENTO_PATH/env/python/requirements.txt" in line for line in lines)
    assert any(line.startswith("ENTRYPOINT") and "entrypoint.sh" in line for line in lines)
    assert "exec bentoml" in (bento / "env/docker/entrypoint.sh").read_text()
    assert "service: serving.service:Bessemer" in (bento / "src/bentofile.yaml").read_text()
    assert "EXPOSE 3000" in lines


def test_the_container_gets_the_pinned_requirements_and_no_torch(bento: Path) -> None:
    installed = [
        line
        for line in (bento / "env/python/requirements.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    pins = lock.FILE.read_text().splitlines()
    assert set(installed) == {line for line in pins if not line.startswith("#")}
    names = {line.partition("==")[0] for line in installed}
    assert {"bentoml", "onnxruntime", "onnxruntime-genai", "tokenizers", "jinja2", "numpy"} <= names
    assert not names & {"torch", "transformers", "dvc", "prefect", "optimum", "datasets"}
    assert all("==" in line and "://" not in line for line in installed)


def test_the_services_pins_are_current_and_the_chains_own() -> None:
    assert lock.FILE.read_text() == lock.text()
    chain = {line.replace("_", "-").lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert {f"{name}=={version}" for name, version in lock.closure().items()} <= chain


def test_the_closure_follows_extras_and_markers() -> None:
    found = lock.closure(("bentoml",))
    assert found["bentoml"] == distribution("bentoml").version
    assert "starlette" in found
    assert "grpcio" not in found  # asked for by an extra that nobody asked for
    assert "tomli" not in found  # only for Pythons before 3.11


def test_a_changed_service_or_model_makes_a_new_bento(package: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    shutil.copytree(ROOT / "serving", root / "serving")
    shutil.copy(ROOT / "bentofile.yaml", root)
    opened = open_package(package)
    versions = [build.version_of(opened), build.version_of(opened, root)]
    assert versions[0] == versions[1]
    (root / "serving/__pycache__").mkdir(exist_ok=True)
    (root / "serving/__pycache__/left.pyc").write_bytes(b"compiled")
    assert build.version_of(opened, root) == versions[0]
    for name in ("serving/web/chat.html", "serving/requirements.txt", "bentofile.yaml"):
        with (root / name).open("a") as file:
            file.write("\n")
        versions.append(build.version_of(opened, root))
    (root / "serving/new.py").write_text("")
    versions.append(build.version_of(opened, root))
    shutil.copytree(package, tmp_path / "package")
    provenance = {**opened.provenance, "model": "another"}
    (tmp_path / "package/provenance.json").write_text(json.dumps(provenance))
    versions.append(build.version_of(open_package(tmp_path / "package"), root))
    assert len(set(versions)) == len(versions) - 1


def test_the_bento_answers_with_the_package_inside_it(
    bento: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(store))
    port = free_port()
    command = ("bentoml", "serve", f"bessemer:{bento.name}", "--port", str(port))
    with serving(*command, package=None, port=port, log=tmp_path / "log", cwd=tmp_path):
        address = f"http://127.0.0.1:{port}"
        answered = httpx.post(f"{address}/generate", json={"input": question("Japan")})
        assert answered.json() == {"output": answer("Japan")}
        assert httpx.get(f"{address}/provenance").json()["model"] == TAG
        for path in ("", "rank", "assets/rank.js"):
            assert httpx.get(f"{address}/{path}").status_code == 200, path


def test_finding_it_loads_nothing_heavy(bento: Path, package: Path, store: Path) -> None:
    """`bessemer run` looks for it each time, also where there is nothing to do."""
    heavy = ("prefect", "torch", "transformers", "onnxruntime", "numpy")
    code = f"""
import sys
from serving.build import build
assert not build().made
print([name for name in {heavy} if name in sys.modules])
"""
    env = {**os.environ, "BENTOML_HOME": str(store), "BESSEMER_PACKAGE": str(package)}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
