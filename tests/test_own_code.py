"""The command hands over to the project's own code, and refuses a project of another version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.own_code import use_project_code
from tasks.common.settings import BessemerError
from tests.conftest import ROOT, copy_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path, "smoke").path


def test_command_runs_the_projects_own_code(project: Path) -> None:
    """The entry point of this installation, called in a subfolder of a project whose code was changed."""
    cli = project / "flows/cli.py"
    cli.write_text(cli.read_text().replace("Print which stages would run, why,", "Print what this project changed,"))
    command = [sys.executable, "-c", "from flows.cli import main; main()", "plan", "--help"]
    done = subprocess.run(
        command, cwd=project / "data/sources", env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    assert "Print what this project changed," in done.stdout


def test_same_code_is_not_started_again() -> None:
    use_project_code(ROOT)  # would replace this process


def test_folder_without_code_is_served_by_the_installation(tmp_path: Path) -> None:
    use_project_code(tmp_path)


@pytest.mark.parametrize(
    ("file", "pattern", "text", "sentence"),
    [
        ("pyproject.toml", r'version = "[^"]+"', 'version = "9.0"', "the project is of version 9.0, the command of"),
        ("requirements.lock", r"torch==\S+", "torch==1.0", r"requirements.lock differs \(torch==1.0, torch=="),
    ],
)
def test_project_of_another_version_is_refused(
    file: str, pattern: str, text: str, sentence: str, project: Path
) -> None:
    path = project / file
    path.write_text(re.sub(pattern, text, path.read_text(), count=1))
    with pytest.raises(BessemerError, match=sentence) as failure:
        use_project_code(project)
    assert "`make install` there installs its packages" in str(failure.value)
