"""Examples of the project's own data, and the neutral ones of a package without any."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows import endpoint
from serving.errors import PackageError
from serving.examples import NEUTRAL_MASKED, NEUTRAL_QUESTION, Examples, prompts_to_rank, read_examples
from serving.package import PACKAGE_VARIABLE, open_package
from tests.serving_fixtures import answer, package, question

__all__ = ["package"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def copied(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the package, which is the served one."""
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    monkeypatch.setenv(PACKAGE_VARIABLE, str(folder))
    return folder


def write(folder: Path, **changes: Any) -> None:
    content = {"prompts": [], "samples": [], "masked": None, "classified": None, **changes}
    (folder / "examples.json").write_text(json.dumps(content), encoding="utf-8")


def test_package_without_examples_has_neutral_ones(copied: Path) -> None:
    (copied / "examples.json").unlink()
    found = read_examples(copied)
    assert found == Examples()
    assert (found.question, found.masked_text) == (NEUTRAL_QUESTION, NEUTRAL_MASKED)
    assert "[MASK]" in found.masked_text


def test_long_sample_is_no_example_of_a_request(copied: Path) -> None:
    write(copied, samples=["long " * 100])
    assert read_examples(copied).question == NEUTRAL_QUESTION


def test_damaged_examples_name_the_file(copied: Path) -> None:
    (copied / "examples.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PackageError, match="has no entry"):
        read_examples(copied)


def test_prompts_to_rank_fit_the_models_context(copied: Path) -> None:
    write(copied, prompts=[user("and " * 999), user(question("France")), user("<|end|>")])
    assert prompts_to_rank(open_package(copied)) == [user(question("France"))]
    (copied / "chat/chat_template.jinja").write_text("{{ messages[0].absent.name }}", encoding="utf-8")
    assert prompts_to_rank(open_package(copied)) == []
    shutil.rmtree(copied / "chat")
    assert prompts_to_rank(open_package(copied)) == []


def test_chat_samples_asks_the_projects_questions(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(copied, samples=[question("France"), "and " * 999, question("Italy")])
    endpoint.chat(copied, None, None)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"> {question('France')}", answer("France"), f"> {question('Italy')}", answer("Italy")]


def test_chat_samples_of_a_package_without_data_asks_a_neutral_question(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(copied)
    endpoint.chat(copied, None, None)
    assert capsys.readouterr().out.startswith(f"> {NEUTRAL_QUESTION}\n")


def test_no_code_of_the_command_line_and_the_endpoint_names_the_example() -> None:
    """The countries and elements are the data of a profile; the report knows the readers of their packages by role."""
    root = Path(__file__).resolve().parents[1]
    words = ("Peru", "Lima", "capital of", "symbol of", "is Paris", "nitrogen", "countr", "Germany")
    found = [
        f"{path.relative_to(root)}: {word}" for folder in ("flows", "serving") for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".html", ".js", ".j2") for word in words if word in path.read_text(encoding="utf-8")
    ]  # fmt: skip
    assert found == []
