"""Each override of torch or Transformers states what it replaces, in which release, and when it can be deleted."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

OVERRIDES = sorted(path for path in (ROOT / "tasks/common/overrides").glob("*.py") if path.stem != "__init__")
REPLACES = re.compile(r"^Replaces: (?P<symbols>[\w., ]+) \((?P<library>torch|transformers) \d+\.\d+(\.\d+)?\)", re.M)


@pytest.mark.parametrize("path", OVERRIDES, ids=lambda path: path.stem)
def test_override_modules_name_replaced_code_and_removal_condition(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    match = REPLACES.search(text)
    assert match, f"{path.name}: expected a line `Replaces: SYMBOL, ... (torch 2.13)` in its docstring"
    assert re.search(r"^Delete when: \w", text, re.M), f"{path.name}: expected a line `Delete when: ...`"
    for symbol in match["symbols"].split(", "):
        assert symbol.startswith(f"{match['library']}.")
        assert _resolve(symbol) is not None


def _resolve(symbol: str) -> object:
    """Return the object of a dotted name; raise AttributeError if the library no longer has it."""
    *parts, last = symbol.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in (*parts[length:], last):
            value = getattr(value, name)
        return value
    raise AttributeError(symbol)


def test_a_stage_does_not_import_scikit_learn() -> None:
    """Transformers would import it for a kind of generation that no stage uses."""
    code = "from tasks.common.overrides import sklearn_import; sklearn_import.install()\n"
    code += "from transformers import LlamaForCausalLM; import sys; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
