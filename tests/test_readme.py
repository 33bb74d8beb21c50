"""The README's commands, run verbatim under the smoke profile, except the test command."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.chain_fixtures import environment, run
from tests.conftest import ROOT, Project
from tests.servers import stop_server, wait_until_up

README = (ROOT / "README.md").read_text(encoding="utf-8")
PORT = 3000


def commands() -> list[str]:
    """Return the lines of the README's `sh` blocks, comments aside."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = (line.partition("  #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def test_readme_contains_the_two_commands() -> None:
    assert {"make run", "make test"} <= set(commands())


def test_readme_paths_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme_commands_exit_with_0(chain: Project, tmp_path: Path) -> None:
    shell = [line for line in commands() if not line.startswith(("make test",))]
    assert any(line.startswith("make serve") for line in shell)
    path = f"export PATH={shlex.quote(str(chain.path / '.venv/bin'))}:$PATH; "
    server, log = None, tmp_path / "serve.log"
    try:
        for line in shell:
            if line.startswith("make serve"):
                with log.open("wb") as output:
                    server = subprocess.Popen(
                        ["bash", "-c", f"exec {line}"],
                        cwd=chain.path,
                        env=environment(chain),
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                wait_until_up(server, PORT, log)
            else:
                assert run(chain, "bash", "-c", path + line).strip(), f"{line} printed nothing"
    finally:
        if server:
            stop_server(server)
