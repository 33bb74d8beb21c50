"""The Bento: built once, reproducible, rebuilt when the service or the model changes, offline, and serving."""

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
    """Run the build command without network access; return its output."""
    unused_address = "http://127.0.0.1:9"
    offline = {"HTTP_PROXY": unused_address, "HTTPS_PROXY": unused_address, "PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}
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
    """A BentoML store with the package's Bento."""
    store = tmp_path_factory.mktemp("bentoml")
    assert "built" in make(package, store)
    return store


@pytest.fixture(scope="module")
def bento(store: Path) -> Path:
    [folder] = [path for path in (store / "bentos/bessemer").iterdir() if path.is_dir()]
    return folder


def content(bento: Path) -> dict[str, str]:
    """Return path -> hash of a Bento's files, except bento.yaml, which contains the creation time."""
    files = [path for path in bento.rglob("*") if path.is_file() and path.name != "bento.yaml"]
    return {str(path.relative_to(bento)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_bento_version_and_label(bento: Path, package: Path) -> None:
    assert bento.name == build.bento_version(open_package(package))
    manifest = YAML(typ="safe").load(bento / "bento.yaml")
    assert (manifest["name"], manifest["entry_service"]) == ("bessemer", "Bessemer")
    assert manifest["labels"]["model"] == TAG


def test_build_twice_reports_the_existing_bento(bento: Path, package: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bento.rglob("*")}
    printed = make(package, store)
    assert f"bessemer:{bento.name}: already exists" in printed
    assert {path: path.stat().st_mtime_ns for path in bento.rglob("*")} == before


def test_build_in_another_folder_has_the_same_content(bento: Path, package: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(package, elsewhere)
    make(elsewhere, tmp_path / "store")
    assert content(tmp_path / "store/bentos/bessemer" / bento.name) == content(bento)


def test_bento_contains_only_service_and_package(bento: Path, package: Path) -> None:
    files = {path.relative_to(bento / "src") for path in (bento / "src").rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT) for path in build.service_files()} | {Path("bentofile.yaml")}
    expected |= {Path("data/package") / path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    assert files == expected


def test_cache_links_are_copied_as_files(package: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    shutil.copytree(package, linked)
    (linked / "chat/openvino_model.bin").unlink()
    (linked / "chat/openvino_model.bin").symlink_to(package / "chat/openvino_model.bin")
    make(linked, tmp_path / "store")
    [copied] = (tmp_path / "store").glob("bentos/bessemer/*/src/data/package/chat/openvino_model.bin")
    assert not copied.is_symlink()
    assert copied.read_bytes() == (package / "chat/openvino_model.bin").read_bytes()


def test_dockerfile_has_base_image_requirements_and_entrypoint(bento: Path) -> None:
    lines = (bento / "env/docker/Dockerfile").read_text().splitlines()
    assert "FROM python:3.11-slim AS base-container" in lines
    assert any("pip install -r $BENTO_PATH/env/python/requirements.txt" in line for line in lines)
    assert any(line.startswith("ENTRYPOINT") and "entrypoint.sh" in line for line in lines)
    assert "exec bentoml" in (bento / "env/docker/entrypoint.sh").read_text()
    assert "service: serving.service:Bessemer" in (bento / "src/bentofile.yaml").read_text()
    assert "EXPOSE 3000" in lines


def test_container_requirements_are_pinned_and_without_torch(bento: Path) -> None:
    installed = [
        line
        for line in (bento / "env/python/requirements.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    pins = lock.FILE.read_text().splitlines()
    assert set(installed) == {line for line in pins if not line.startswith("#")}
    names = {line.partition("==")[0] for line in installed}
    assert {"bentoml", "openvino", "openvino-genai", "tokenizers", "jinja2", "numpy"} <= names
    assert not names & {"torch", "transformers", "dvc", "prefect", "optimum", "datasets"}
    assert all("==" in line and "://" not in line for line in installed)


def test_requirements_match_the_environment_and_requirements_lock() -> None:
    assert lock.FILE.read_text() == lock.requirements_text()
    chain = {line.replace("_", "-").lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert {f"{name}=={version}" for name, version in lock.closure().items()} <= chain


def test_the_closure_follows_extras_and_markers() -> None:
    requirements = lock.closure(("bentoml",))
    assert requirements["bentoml"] == distribution("bentoml").version
    assert "starlette" in requirements
    assert "grpcio" not in requirements  # required by an extra that is not selected
    assert "tomli" not in requirements  # only for Pythons before 3.11


def test_changed_service_or_model_changes_the_bento_version(package: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    shutil.copytree(ROOT / "serving", root / "serving")
    shutil.copy(ROOT / "bentofile.yaml", root)
    served = open_package(package)
    versions = [build.bento_version(served), build.bento_version(served, root)]
    assert versions[0] == versions[1]
    (root / "serving/__pycache__").mkdir(exist_ok=True)
    (root / "serving/__pycache__/left.pyc").write_bytes(b"compiled")
    assert build.bento_version(served, root) == versions[0]
    for name in ("serving/web/chat.html", "serving/requirements.txt", "bentofile.yaml"):
        with (root / name).open("a") as file:
            file.write("\n")
        versions.append(build.bento_version(served, root))
    (root / "serving/new.py").write_text("")
    versions.append(build.bento_version(served, root))
    shutil.copytree(package, tmp_path / "package")
    provenance = {**served.provenance, "model": "another"}
    (tmp_path / "package/provenance.json").write_text(json.dumps(provenance))
    versions.append(build.bento_version(open_package(tmp_path / "package"), root))
    examples = json.loads((package / "examples.json").read_text())
    (tmp_path / "package/examples.json").write_text(json.dumps({**examples, "samples": ["Another?"]}))
    versions.append(build.bento_version(open_package(tmp_path / "package"), root))
    assert len(set(versions)) == len(versions) - 1


def test_bento_serves_its_own_package(
    bento: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(store))
    port = free_port()
    command = ("bentoml", "serve", f"bessemer:{bento.name}", "--port", str(port))
    with serving(*command, package=None, port=port, log=tmp_path / "log", cwd=tmp_path):
        address = f"http://127.0.0.1:{port}"
        response = httpx.post(f"{address}/generate", json={"input": question("Japan")})
        assert response.json() == {"output": answer("Japan")}
        assert httpx.get(f"{address}/provenance").json()["model"] == TAG
        for path in ("", "rank", "assets/rank.js"):
            assert httpx.get(f"{address}/{path}").status_code == 200, path


def test_build_of_existing_bento_imports_no_heavy_package(bento: Path, package: Path, store: Path) -> None:
    """`bessemer run` looks for the Bento every time, even if nothing has changed."""
    heavy = ("prefect", "torch", "transformers", "openvino", "numpy")
    code = f"""
import sys
from serving.build import build
assert not build().created
print([name for name in {heavy} if name in sys.modules])
"""
    env = {**os.environ, "BENTOML_HOME": str(store), "BESSEMER_PACKAGE": str(package)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"
