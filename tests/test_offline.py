"""The guard that blocks connections to other machines in the servers and runs of the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, offline

# The telemetry sends from a fork of the process and ends it after three seconds. A fork that is made while a module is
# being imported may inherit a locked import lock and never send, so events are sent again once the import is done.
OPENVINO = """
import os, pathlib, time
import openvino, openvino_telemetry
record, patience = pathlib.Path(os.environ["BESSEMER_CONNECTIONS"]), time.monotonic() + 60
while not record.exists() and time.monotonic() < patience:
    openvino_telemetry.Telemetry().send_event("guard", "test", "import")
    time.sleep(1)
"""
REMOTE_CALLS = {
    "telemetry of OpenVINO": OPENVINO,
    "a name": "import socket; socket.getaddrinfo('example.org', 80)",
    "an address": "import socket; socket.create_connection(('192.0.2.1', 9), 1)",
}
LOCAL_CALLS = {
    "OpenVINO as the product imports it": "from serving import folders; folders.import_openvino(); "
    "import openvino_genai",
    "a port of this machine": "import socket; s = socket.create_server(('127.0.0.1', 0)); "
    "socket.create_connection(s.getsockname()); socket.getaddrinfo('localhost', 80)",
    "models without torchvision": "from transformers import LlamaForCausalLM, ModernBertForMaskedLM",
}


def run(code: str, record: Path, home: Path) -> str:
    """Run Python under the guard with an empty home directory; return the record of refused connections."""
    environment = offline(record) | {"HOME": str(home)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    return record.read_text() if record.exists() else ""


@pytest.mark.parametrize("case", REMOTE_CALLS)
def test_guard_refuses_and_records_connections(case: str, tmp_path: Path) -> None:
    """Including OpenVINO's telemetry if no setting disables it."""
    assert run(REMOTE_CALLS[case], tmp_path / "record", tmp_path).startswith("socket.")


@pytest.mark.parametrize("case", LOCAL_CALLS)
def test_guard_allows_local_connections(case: str, tmp_path: Path) -> None:
    assert run(LOCAL_CALLS[case], tmp_path / "record", tmp_path) == ""


def test_no_import_needs_torchvision(tmp_path: Path) -> None:
    """optimum-intel depends on it, and it breaks all models with another build of torch, so the lock omits it."""
    assert not any(line.startswith("torchvision") for line in (ROOT / "requirements.lock").read_text().splitlines())
    modules = "transformers.models.llama.modeling_llama, transformers.models.modernbert.modeling_modernbert, trl, peft"
    code = f"import sys; sys.modules['torchvision'] = None\nimport {modules}\n"
    code += "from serving import folders; folders.import_openvino()\nfrom optimum.intel import OVModelForCausalLM\n"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
