"""The architecture matrix: every family through every stage, correct against PyTorch or refused by a sentence.

The table in docs/reference/architectures.md says which; a cell that says otherwise fails here. `MATRIX_SEED` and
`MATRIX_HIDDEN` in the environment run the matrix with another seed and width.
"""

import os
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tasks.common.settings import BessemerError
from tests.architecture_checks import DECODER_COLUMNS, ENCODER_COLUMNS, Case, write_case
from tests.conftest import ROOT
from tests.family_fixtures import DECODERS, ENCODERS, Shape

PAGE = ROOT / "docs/reference/architectures.md"
SHAPE = Shape(seed=int(os.environ.get("MATRIX_SEED", "0")), hidden=int(os.environ.get("MATRIX_HIDDEN", "32")))


@cache
def documented() -> dict[tuple[str, str], str]:
    """Return the cells of the page's tables by family and column: yes or no."""
    cells: dict[tuple[str, str], str] = {}
    header: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            header = []
            continue
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = row
        elif match := re.fullmatch(r"`([\w-]+)`", row[0]):
            cells |= {(match[1], column): cell for column, cell in zip(header[2:], row[2:], strict=True)}
    return cells


def matrix() -> Iterator[tuple[str, str]]:
    """Yield every family and column, a family's columns one after another."""
    yield from ((family, column) for family in DECODERS for column in DECODER_COLUMNS)
    yield from ((family, column) for family in ENCODERS for column in ENCODER_COLUMNS)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The folders written so far, by family."""
    return {}


@pytest.mark.parametrize(("family", "column"), list(matrix()), ids=lambda value: value.replace(" ", "-"))
def test_family_is_correct_or_refused(
    family: str, column: str, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if family not in cases:
        cases.clear()  # one model in memory is enough
        cases[family] = write_case(family, tmp_path_factory.mktemp(family), SHAPE)
    check = (DECODER_COLUMNS if family in DECODERS else ENCODER_COLUMNS)[column]
    if documented()[family, column] == "yes":
        check(cases[family])
    else:
        with pytest.raises(BessemerError):
            check(cases[family])


def test_page_lists_every_family_and_column() -> None:
    assert documented().keys() == set(matrix())
    assert set(documented().values()) == {"yes", "no"}


def test_twenty_families_are_correct_from_training_to_the_endpoint() -> None:
    wanted: dict[str, tuple[str, ...]] = dict.fromkeys(DECODERS, ("finetune", "align", "quantize and serve"))
    wanted |= dict.fromkeys(ENCODERS, ("classification", "quantize and serve"))
    complete = [name for name, columns in wanted.items() if all(documented()[name, at] == "yes" for at in columns)]
    assert len(complete) >= 20
