"""Random streams: they do not collide, and stages use no other generators."""

import ast
from collections.abc import Iterator

import numpy as np
import pytest

from tasks.common.random_streams import MAX_INDEX, Stream, derive_seed, generator, seed_torch, torch_generator
from tests.conftest import ROOT

INDICES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (MAX_INDEX - 1,))
# Calls that create or seed a generator.
MAKERS = {
    "default_rng", "RandomState", "SeedSequence", "manual_seed", "manual_seed_all", "set_seed", "seed", "Random",
}  # fmt: skip


def test_no_two_streams_collide() -> None:
    """Streams, seeds and indices give different numbers; the index (1,) differs from (1, 0)."""
    states = {
        (seed, stream, index): (*generator(seed, stream, *index).integers(2**62, size=2),)
        for seed in (0, 1, 2)
        for stream in Stream
        for index in INDICES
    }
    assert len(set(states.values())) == len(states) == 3 * len(Stream) * len(INDICES)
    derived = {derive_seed(seed, stream, *index) for seed, stream, index in states}
    assert len(derived) == len(states)
    assert 0 <= min(derived) <= max(derived) < 2**63


def test_no_stream_is_the_plain_generator_of_a_seed() -> None:
    """A user's own code in a stage may use `default_rng(seed)`."""
    plain = {int(np.random.default_rng(key).integers(2**62)) for key in (0, 1, [1, 0], [1, 2], [1, 2, 1])}
    assert plain.isdisjoint(int(generator(1, stream, 2).integers(2**62)) for stream in Stream)


def test_derived_seeds_are_unchanged() -> None:
    """Recipes are reproducible only if these numbers do not change; numpy guarantees SeedSequence."""
    assert derive_seed(1, Stream.DROPOUT, 7, 0) == 6407829741375965434
    assert derive_seed(0, Stream.WINDOWS, 5, 0) == 2580308244902650202


@pytest.mark.parametrize("index", [-1, MAX_INDEX])
def test_index_out_of_range_is_rejected(index: int) -> None:
    with pytest.raises(ValueError, match=rf"the index of WINDOWS is \(1, {index}\); expected numbers from 0"):
        generator(1, Stream.WINDOWS, 1, index)


def test_torchs_generators_are_seeded_from_a_stream() -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        seed_torch(3, Stream.DROPOUT, 5, device="cpu")
        of_the_device = torch.rand(3)
        seed_torch(3, Stream.DROPOUT, 5)
        assert torch.equal(torch.rand(3), of_the_device)
    own = torch_generator("cpu", 3, Stream.DROPOUT, 5)
    assert torch.equal(torch.rand(3, generator=own), of_the_device)


def calls() -> Iterator[tuple[str, int, str]]:
    """Yield file, line and name of every call in the stages."""
    for path in sorted((ROOT / "tasks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield path.relative_to(ROOT).as_posix(), node.lineno, name


def test_only_random_streams_creates_generators() -> None:
    streams_module = "tasks/common/random_streams.py"
    other_calls = [f"{path}:{line} {name}" for path, line, name in calls() if name in MAKERS and path != streams_module]
    assert other_calls == [], "use a stream of tasks.common.random_streams, and add a new one for a new purpose"


def test_every_stream_is_used() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tasks").rglob("*.py"))
    assert [stream.name for stream in Stream if f"Stream.{stream.name}" not in text] == []
