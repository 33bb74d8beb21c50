"""Identity: the same things give the same hashes wherever they lie, and whatever bears on a result changes them."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common import identity

PARTS: dict[str, Any] = {
    "code": {"tasks/a.py": "1"},
    "settings": {"rate": 0.1},
    "numerics": {"threads": 2},
    "seed": 1,
    "lock": "2",
    "inputs": {"data/x": "3"},
    "key": None,
}


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files beneath a folder."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A stage `tasks.cook` that imports a helper, which imports two more, one of them inside a function."""
    return write(
        tmp_path,
        {
            "tasks/__init__.py": "",
            "tasks/common/__init__.py": "",
            "tasks/cook.py": "import json\nfrom tasks.common import pots\n",
            "tasks/common/pots.py": "import tasks.common.fire\ndef boil():\n    from tasks.common.water import cup\n",
            "tasks/common/fire.py": "",
            "tasks/common/water.py": "from serving.tap import open_tap\ncup = 1\n",
            "tasks/common/unused.py": "",
            "serving/__init__.py": "",
            "serving/tap.py": "def open_tap(): ...\n",
            "flows/__init__.py": "",
        },
    )


class TestCode:
    def test_the_closure_reaches_what_is_imported_indirectly(self, project: Path) -> None:
        assert [path.as_posix() for path in identity.code_files("tasks.cook", project)] == [
            "serving/__init__.py",
            "serving/tap.py",
            "tasks/__init__.py",
            "tasks/common/__init__.py",
            "tasks/common/fire.py",
            "tasks/common/pots.py",
            "tasks/common/water.py",
            "tasks/cook.py",
        ]

    def test_modules_that_import_each_other_are_no_trap(self, tmp_path: Path) -> None:
        files = {"tasks/__init__.py": "", "tasks/a.py": "import tasks.b\n", "tasks/b.py": "import tasks.a\n"}
        root = write(tmp_path, files)
        assert len(identity.code_files("tasks.a", root)) == 3


class TestTrees:
    def test_a_folder_has_the_hash_of_its_names_and_bytes(self, tmp_path: Path) -> None:
        one, two = (write(tmp_path / name, {"a.txt": "1", "deep/b.txt": "2"}) for name in ("one", "two"))
        assert identity.tree_hash(one) == identity.tree_hash(two)
        os.utime(two / "a.txt", (0, 0))
        assert identity.tree_hash(one) == identity.tree_hash(two)

    @pytest.mark.parametrize("change", [{"a.txt": "other"}, {"c.txt": ""}, {"deep/c.txt": "2"}])
    def test_another_byte_or_name_is_another_hash(self, tmp_path: Path, change: dict[str, str]) -> None:
        folder = write(tmp_path / "x", {"a.txt": "1", "deep/b.txt": "2"})
        before = identity.tree_hash(folder)
        write(folder, change)
        assert identity.tree_hash(folder) != before

    def test_a_moved_file_is_another_tree(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "x", {"a.txt": "1", "b.txt": "2"})
        before = identity.tree_hash(folder)
        (folder / "a.txt").rename(folder / "c.txt")
        assert identity.tree_hash(folder) != before

    def test_what_is_missing_has_no_hash(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no hash"):
            identity.tree_hash(tmp_path / "nothing")


class TestValues:
    def test_order_of_keys_does_not_count(self) -> None:
        assert identity.hash_json({"a": 1, "b": [1, 2]}) == identity.hash_json({"b": [1, 2], "a": 1})
        assert identity.hash_json([1, 2]) != identity.hash_json([2, 1])

    @pytest.mark.parametrize(
        "value",
        [{1, 2}, b"bytes", Path("x"), math.nan, math.inf, {1: "a"}, object(), np.float32(1), {"deep": [{"x": {1}}]}],
    )
    def test_a_value_without_stable_bytes_is_refused(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"stable bytes"):
            identity.hash_json(value)

    def test_the_place_of_such_a_value_is_named(self) -> None:
        with pytest.raises(TypeError, match=r"value\.ppo\.rates\[1\]"):
            identity.hash_json({"ppo": {"rates": [0.1, math.nan]}})


class TestLock:
    def hash_of(self, tmp_path: Path, text: str) -> str:
        """Return the hash of a lock file with this text."""
        path = tmp_path / "requirements.lock"
        path.write_text(text)
        return identity.lock_hash(path)

    def test_comments_order_case_and_build_tags_do_not_count(self, tmp_path: Path) -> None:
        plain = self.hash_of(tmp_path, "torch==2.13.0\nJinja2==3.1.6\n")
        assert self.hash_of(tmp_path, "# made by hand\n\njinja2==3.1.6  # why\ntorch==2.13.0+cpu\n") == plain

    @pytest.mark.parametrize(
        "text", ["torch==2.13.1\nJinja2==3.1.6\n", "torch==2.13.0\n", "torch==2.13.0.post1\nJinja2==3.1.6\n"]
    )
    def test_another_version_or_package_counts(self, tmp_path: Path, text: str) -> None:
        assert self.hash_of(tmp_path, text) != self.hash_of(tmp_path, "torch==2.13.0\nJinja2==3.1.6\n")


class TestRecipe:
    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("code", {"tasks/a.py": "9"}),
            ("code", {"tasks/a.py": "1", "tasks/b.py": "1"}),
            ("settings", {"rate": 0.2}),
            ("numerics", {"threads": 1}),
            ("seed", 2),
            ("lock", "9"),
            ("inputs", {"data/x": "9"}),
            ("key", "mlm"),
        ],
    )
    def test_everything_that_bears_on_a_result_changes_it(self, part: str, value: Any) -> None:
        assert identity.recipe(**{**PARTS, part: value}) != identity.recipe(**PARTS)

    def test_it_is_the_same_on_every_machine(self) -> None:
        assert identity.recipe(**PARTS) == "ee046672a645b532112d4743a0ce8ee93918a411d50114453beb36ab1d1f0474"

    def test_a_tag_names_recipe_and_content(self) -> None:
        assert identity.tag("a" * 64, "b" * 64) == "aaaaaaaaaaaa-bbbbbbbbbbbb"
