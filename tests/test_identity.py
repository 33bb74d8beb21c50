"""Identity: equal contents give equal hashes in any folder, and everything that affects a result changes them."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common import identity

PARTS: dict[str, Any] = {
    "code": "1",
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


class TestTrees:
    def test_tree_hash_matches_names_and_bytes(self, tmp_path: Path) -> None:
        one, two = (write(tmp_path / name, {"a.txt": "1", "deep/b.txt": "2"}) for name in ("one", "two"))
        assert identity.tree_hash(one) == identity.tree_hash(two)
        os.utime(two / "a.txt", (0, 0))
        assert identity.tree_hash(one) == identity.tree_hash(two)

    @pytest.mark.parametrize("change", [{"a.txt": "other"}, {"c.txt": ""}, {"deep/c.txt": "2"}])
    def test_tree_hash_changes_with_bytes_and_names(self, tmp_path: Path, change: dict[str, str]) -> None:
        folder = write(tmp_path / "x", {"a.txt": "1", "deep/b.txt": "2"})
        before = identity.tree_hash(folder)
        write(folder, change)
        assert identity.tree_hash(folder) != before

    def test_tree_hash_changes_with_a_moved_file(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "x", {"a.txt": "1", "b.txt": "2"})
        before = identity.tree_hash(folder)
        (folder / "a.txt").rename(folder / "c.txt")
        assert identity.tree_hash(folder) != before

    def test_missing_path_has_no_hash(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no hash"):
            identity.tree_hash(tmp_path / "nothing")


class TestValues:
    def test_hash_ignores_order_of_keys(self) -> None:
        assert identity.hash_json({"a": 1, "b": [1, 2]}) == identity.hash_json({"b": [1, 2], "a": 1})
        assert identity.hash_json([1, 2]) != identity.hash_json([2, 1])

    @pytest.mark.parametrize(
        "value",
        [{1, 2}, b"bytes", Path("x"), math.nan, math.inf, {1: "a"}, object(), np.float32(1), {"deep": [{"x": {1}}]}],
    )
    def test_value_without_stable_bytes_is_rejected(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"stable bytes"):
            identity.hash_json(value)

    def test_unstable_value_error_names_its_key(self) -> None:
        with pytest.raises(TypeError, match=r"value\.align\.rates\[1\]"):
            identity.hash_json({"align": {"rates": [0.1, math.nan]}})


class TestLock:
    def hash_of(self, tmp_path: Path, text: str) -> str:
        """Return the hash of a lock file with this text."""
        path = tmp_path / "requirements.lock"
        path.write_text(text)
        return identity.lock_hash(path)

    def test_lock_hash_ignores_comments_order_case_and_build_tags(self, tmp_path: Path) -> None:
        plain = self.hash_of(tmp_path, "torch==2.13.0\nJinja2==3.1.6\n")
        assert self.hash_of(tmp_path, "# made by hand\n\njinja2==3.1.6  # why\ntorch==2.13.0+cpu\n") == plain

    @pytest.mark.parametrize(
        "text", ["torch==2.13.1\nJinja2==3.1.6\n", "torch==2.13.0\n", "torch==2.13.0.post1\nJinja2==3.1.6\n"]
    )
    def test_lock_hash_changes_with_versions_and_packages(self, tmp_path: Path, text: str) -> None:
        assert self.hash_of(tmp_path, text) != self.hash_of(tmp_path, "torch==2.13.0\nJinja2==3.1.6\n")


class TestRecipe:
    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("code", "9"),
            ("settings", {"rate": 0.2}),
            ("numerics", {"threads": 1}),
            ("seed", 2),
            ("lock", "9"),
            ("inputs", {"data/x": "9"}),
            ("key", "mlm"),
        ],
    )
    def test_recipe_changes_with_every_input(self, part: str, value: Any) -> None:
        assert identity.recipe(**{**PARTS, part: value}) != identity.recipe(**PARTS)

    def test_recipe_is_stable_across_machines(self) -> None:
        assert identity.recipe(**PARTS) == "2b22b1efd6845360a22ce302ff83464dc9ae756318083533b11d4575bf740ff9"

    def test_a_tag_names_recipe_and_content(self) -> None:
        assert identity.tag("a" * 64, "b" * 64) == "aaaaaaaaaaaa-bbbbbbbbbbbb"
