"""What changes the digest of a definition (computation) and what does not (wording)."""

import ast
import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.common.code.canonical import FIELD_CHECKS
from tasks.common.code.digests import canonical_json, digest_source
from tests.conftest import ROOT

SAMPLE = '''
"""A module."""
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING
from pydantic import BaseModel, Field, field_validator
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

RATE, TIMES = 0.5, 3
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """A split."""
    rows: int
    share: float = 0.5


class Settings(BaseModel):
    """Settings."""
    steps: int = Field(10, description="Steps", ge=1)
    rate: float = Field(default=0.1, gt=0)

    @field_validator("steps")
    @classmethod
    def _even(cls, steps: int) -> int:
        """Refuse odd steps."""
        if steps % 2:
            raise ValueError(f"found {steps}, but it should be even")
        return steps


def mean(values: list[float], weight: float = 1.0) -> float:
    """Return the mean."""
    if not values or weight < 0:
        remedy = "give some"
        raise ValueError(f"no values: {remedy}")  # nothing to divide by
    total: float = 0.0
    for value in tqdm(values, desc="mean", disable=len(values) > TIMES and weight == 1):
        total += value * weight - RATE ** 2
    if total > 100:
        warnings.warn("large", stacklevel=2)
        logger.info("a total of %s", total)
    print(f"{len(values)} values")
    assert total is not None, "a total"
    return -total / len(values)
'''


def changed(old: str, new: str, text: str = SAMPLE) -> list[str]:
    """Return the definitions whose digests differ after a replacement."""
    assert text.count(old) == 1, old
    return differing(text, text.replace(old, new))


def differing(before: str, after: str, errors: tuple[str, ...] = ()) -> list[str]:
    one, two = digest_source(before, errors), digest_source(after, errors)
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


class TestWording:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"""A module."""', '"""Another\n\nmodule."""'),
            ('"""A module."""', ""),
            ('    """Return the mean."""\n', ""),
            ('    """A split."""', '    """Another."""'),
            ("  # nothing to divide by", "  # why"),
            ("RATE, TIMES = 0.5, 3", "# a rate\nRATE, TIMES = (\n    0.5,  # half\n    3,\n)"),
            ("values: list[float], weight: float", "values: 'Sequence[float]', weight: int"),
            (" -> float:", " -> float | None:"),
            (" -> float:", ":"),
            ("total: float = 0.0", "total = 0.0"),
            ("    total: float = 0.0", "    total: int\n    total = 0.0"),
            ("    rows: int\n", "    rows: int | None\n"),
            ("    import torch", "    import torch\n    from tasks import x"),
            ("import logging", "from __future__ import annotations\nimport logging"),
            ('f"no values: {remedy}"', '"none at all: " + remedy'),
            ('f"no values: {remedy}"', '"; ".join(["none", remedy])'),
            ('f"no values: {remedy}")', '"no values") from None'),
            ('remedy = "give some"', 'remedy = "give a few"'),
            ('        remedy = "give some"\n        raise ValueError(f"no values: {remedy}")',
             '        raise ValueError("no values")'),
            ('f"found {steps}, but it should be even"', '"odd"'),
            ('"large", stacklevel=2', '"very large"'),
            ('"a total of %s", total', '"total: %s of %d", total, len(values)'),
            ('        logger.info("a total of %s", total)\n', ""),
            ('    print(f"{len(values)} values")\n', ""),
            ('    print(f"{len(values)} values")\n', '    if values:\n        print("some", file=sys.stderr)\n'),
            (', "a total"', ""),
            ('desc="mean", ', 'desc=f"the mean of {len(values)}", unit="number", '),
            ('description="Steps", ge=1', 'description="How many", ge=2, le=9'),
            (", gt=0", ""),
        ],
    )  # fmt: skip
    def test_rewording_keeps_every_digest(self, old: str, new: str) -> None:
        assert changed(old, new) == []

    def test_import_only_for_annotations_does_not_change_digests(self) -> None:
        typed = SAMPLE.replace("import warnings", "import warnings\nfrom collections.abc import Sequence")
        assert differing(SAMPLE, typed.replace("values: list[float]", "values: Sequence[float]")) == []
        assert differing(SAMPLE, typed.replace("values: list[float]", 'values: "Sequence[float]"')) == []
        assert differing(SAMPLE, typed) == ["(imports)"]  # the import may have side effects

    def test_import_only_for_messages_does_not_change_digests(self) -> None:
        with_import = SAMPLE.replace("import warnings", "import warnings\nimport platform")
        assert differing(SAMPLE, with_import.replace('"large"', "platform.node()")) == [
            "(imports)",
            "mean",
        ]  # a call could do more
        assert differing(SAMPLE, with_import.replace('"large"', "platform.sys")) == []

    def test_order_of_definitions_and_imports_does_not_change_digests(self) -> None:
        parts = ["import os\n", "import re\n", "def f():\n    return os\n", "class A:\n    def g(self): return re\n"]
        assert differing("".join(parts), "".join(reversed(parts))) == []
        assert differing("class A:\n def f(): x\n def g(): y\n", "class A:\n def g(): y\n def f(): x\n") == []


class TestComputing:
    @pytest.mark.parametrize(
        ("old", "new", "names"),
        [
            ("not values or", "not values and", ["mean"]),
            ("not values or", "values or", ["mean"]),
            ("weight < 0", "weight <= 0", ["mean"]),
            ("value * weight", "value / weight", ["mean"]),
            ("total += value", "total -= value", ["mean"]),
            ("** 2", "** 3", ["mean"]),
            ("-total", "+total", ["mean"]),
            ("if total > 100", "if total > 10", []),  # it guards messages alone
            ("raise ValueError(f\"no", "raise TypeError(f\"no", ["mean"]),
            ("weight: float = 1.0", "weight: float = 2.0", ["mean"]),
            ("RATE, TIMES = 0.5, 3", "RATE, TIMES = 0.5, 4", ["RATE, TIMES"]),
            ("share: float = 0.5", "share: float = 0.6", ["Split"]),
            ("    rows: int\n", "    row: int\n", ["Split"]),
            ("    rows: int\n", "    rows: ClassVar[int]\n", ["Split"]),
            ("frozen=True", "frozen=False", ["Split"]),
            ("Field(10,", "Field(11,", ["Settings"]),
            ("default=0.1", "default=0.2", ["Settings"]),
            ("    rate: float = Field", "    rate: int = Field", ["Settings"]),
            ("steps % 2", "steps % 3", ["Settings._even"]),
            ("        return steps", "        return steps + 1", ["Settings._even"]),
            ('@field_validator("steps")', '@field_validator("rate")', ["Settings._even"]),
            ("from tqdm import tqdm", "from tqdm.auto import tqdm", ["(imports)"]),
            ("disable=len(values) > TIMES and weight == 1", "disable=False", ["mean"]),
            ("def mean(", "def average(", ["average", "mean"]),
        ],
    )  # fmt: skip
    def test_edit_changes_only_the_digest_of_its_definition(self, old: str, new: str, names: list[str]) -> None:
        assert changed(old, new) == names

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("print(next(rows))", "print(len(rows))"),  # it would take a row
            ("print(x := f())", "print(f())"),
            ('print("a", file=out)', 'print("b", file=out)'),  # a file is no terminal
            ("raise SystemExit(1)", "raise SystemExit(2)"),
            ('raise Refused(count, "text")', 'raise Refused(count + 1, "text")'),
            ('return "text"', 'return "other"'),
            ('words = "text"\n    return words', 'words = "other"\n    return words'),
            ('class A:\n        words = "text"\n    return A', 'class A:\n        words = "other"\n    return A'),
            ("if next(rows):\n        print(1)", "pass"),
            ("table.info('text')", "table.info('other')"),  # of something that is no logger
            ("table.cast(kind, 1)", "table.cast(kind, 2)"),
            ('return f"{a}b"', 'return f"{a}c"'),
            ("x = b'a'", "x = 'a'"),
            ("x = 1", "x = 1.0"),
            ("x = True", "x = 1"),
            ("x = None", "x = ..."),
            ("x = [a, b]", "x = (a, b)"),
            ("x = f(a, b)", "x = f(b, a)"),
            ("x = a[1:]", "x = a[:1]"),
            ("yield x", "yield from x"),
            ("global x\n    x = 'text'", "global x\n    x = 'other'"),
        ],
    )  # fmt: skip
    def test_executable_expressions_change_digests(self, before: str, after: str) -> None:
        texts = [f"def f(rows, out):\n    {body}\n" for body in (before, after)]
        assert differing(texts[0], texts[1]) == ["f"]

    def test_error_text_written_to_data_changes_digests_except_in_validators(self) -> None:
        two = SAMPLE.replace("no values", "none").replace("but it should be even", "which is odd")
        assert differing(SAMPLE, two, ("ValueError",)) == ["mean"]
        assert differing(SAMPLE, two, ("TypeError",)) == []

    def test_order_of_executed_statements_changes_digests(self) -> None:
        assert differing("A = 1\nB = A\nA = 2\n", "A = 1\nA = 2\nB = A\n") == ["(order)"]
        assert differing("f(1)\nA = 1\n", "A = 1\nf(1)\n") == ["(order)"]
        assert differing("@add\ndef f(): x\n@add\ndef g(): y\n", "@add\ndef g(): y\n@add\ndef f(): x\n") == ["(order)"]
        validators = ["@field_validator('x')\n def f(): x\n", "@field_validator('x')\n def g(): y\n"]
        one, two = (f"class A(B):\n {' '.join(order)}" for order in (validators, validators[::-1]))
        assert differing(one, two) == ["A"]


SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And,
    ast.Not: ast.UAdd, ast.USub: ast.UAdd, ast.UAdd: ast.USub, ast.Invert: ast.USub, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def mutants(tree: ast.Module) -> Iterator[tuple[int, ast.Module]]:
    """Yield the tree with one operator or number changed, except those in messages and checks."""
    ignored = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns", "exc")]
    ignored += [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in FIELD_CHECKS]
    words = {
        id(part) for node_ignored in ignored if isinstance(node_ignored, ast.AST) for part in ast.walk(node_ignored)
    }
    for number, node in enumerate(ast.walk(tree)):
        operator = isinstance(node, ast.BinOp | ast.BoolOp | ast.UnaryOp | ast.AugAssign | ast.Compare)
        constant = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        if id(node) not in words and (operator or constant):
            mutant = copy.deepcopy(tree)
            twin = next(item for index, item in enumerate(ast.walk(mutant)) if index == number)
            if isinstance(twin, ast.Constant):
                twin.value = not twin.value if isinstance(twin.value, bool) else twin.value + 1  # type: ignore[operator]
            elif isinstance(twin, ast.Compare):
                twin.ops[0] = SWAPS[type(twin.ops[0])]()  # type: ignore[call-overload]
            else:
                twin.op = SWAPS[type(twin.op)]()  # type: ignore[attr-defined]
            yield getattr(node, "lineno", 0), mutant


@pytest.mark.parametrize("path", ["tasks/align/estimates.py", "tasks/common/training/losses.py", "tasks/prune.py"])
def test_every_changed_operator_and_number_changes_a_digest(path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    before = digest_source(source)
    variants = list(mutants(ast.parse(source)))
    assert len(variants) > 30
    assert [line for line, mutant in variants if digest_source(ast.unparse(mutant)) == before] == []


class TestPythons:
    def test_empty_ast_fields_of_later_pythons_do_not_change_digests(self) -> None:
        tree = ast.parse("def f(): return 1\n").body[0]
        before = canonical_json(tree)
        for name in ("type_params", "type_comment"):
            setattr(tree, name, [] if name == "type_params" else None)
        tree._fields = (*tree._fields, "type_params", "coming")  # type: ignore[misc]
        tree.coming = None  # type: ignore[attr-defined]
        assert canonical_json(tree) == before

    def test_adjacent_strings_equal_one_string(self) -> None:
        assert differing('x = f"{a} b" " c" f" d"', 'x = f"{a} b c d"') == []
        assert differing('x = "a" "b"', 'x = "ab"') == []
        assert differing("x = u'a'", "x = 'a'") == []

    @pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
    def test_another_python_gives_the_same_digests(self, version: str) -> None:
        python = other_python(version)
        if python is None:
            pytest.skip(f"there is no Python {version} on this machine")
        program = (
            "import json, sys; from pathlib import Path; from tasks.common.code.digests import digest_source; "
            "print(json.dumps([digest_source(Path(name).read_text(encoding='utf-8')) for name in sys.argv[1:]]))"
        )
        paths = sorted(str(path) for path in (ROOT / "tasks").rglob("*.py"))
        outputs = [
            subprocess.run(
                [interpreter, "-Bc", program, *paths], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
            for interpreter in (sys.executable, python)
        ]
        assert outputs[0] == outputs[1]


def other_python(version: str) -> str | None:
    """Return another Python that starts, on the path or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for python in filter(None, candidates):
        done = subprocess.run([python, "-c", "import ast"], capture_output=True, check=False)
        if done.returncode == 0:
            return python
    return None
