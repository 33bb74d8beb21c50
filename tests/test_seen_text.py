"""Items by seen, nearly seen and unseen text: exact words, the Jaccard index, and the scorecard's parts."""

from pathlib import Path
from typing import Any

import pytest

from tasks.common import tables
from tasks.evaluate.seen_text import classify, shingles_of
from tests.training_fixtures import Chain, chain, config, evaluations

__all__ = ["chain"]

TRAINED = (
    "What is the capital of Peru?", "Tell me about the old lighthouse on the northern coast of the island.", "Hi!",
)  # fmt: skip


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    rows = [
        {"id": str(number), "messages": [*turns(text), {"role": "assistant", "content": "?"}], "entity": text,
         "answer": None, "tone": None, "source": "s", "split": "train"}
        for number, text in enumerate(TRAINED)
    ]  # fmt: skip
    heldout = [*turns("Only held out, never trained on."), {"role": "assistant", "content": "?"}]
    rows.append({**rows[0], "messages": heldout, "split": "heldout"})
    tables.write(rows, tmp_path / "instructions", tables.schema("instructions"))
    return tmp_path / "instructions"


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("what is THE capital of Peru", "seen"),
        ("What is the capital of Kenya?", "nearly"),  # three of five 3-grams
        ("What is the currency of Kenya?", "unseen"),
        ("Tell me about the old lighthouse on the southern coast of the island.", "unseen"),  # 9 of 15
        ("Tell me about the old lighthouse on the northern coast of the sea.", "nearly"),
        ("hi", "seen"),
        ("Ho!", "unseen"),
        ("Only held out, never trained on.", "unseen"),
        ("巴黎是首都", "unseen"),
    ],
)
def test_items_are_grouped_by_the_closest_training_prompt(text: str, group: str, instructions: Path) -> None:
    assert classify([turns(text)], instructions) == [group]


def test_groups_equal_a_plain_comparison_of_all_pairs(instructions: Path) -> None:
    """Removing found texts from the search changes nothing, and equal prompts have equal groups."""
    prompts = [turns(f"What is the {what} of {name}?") for what in ("capital", "size") for name in ("Peru", "Rome")]
    prompts += prompts[:2]
    own = [shingles_of(tuple(prompt[0]["content"].lower().strip("?").split())) for prompt in prompts]
    trained = [shingles_of(tuple(text.lower().strip("?!.").split())) for text in TRAINED]
    jaccard = [max(len(a & b) / len(a | b) for b in trained) for a in own]
    expected = ["seen" if value == 1 else "nearly" if value >= 0.6 else "unseen" for value in jaccard]
    assert classify(prompts, instructions) == expected
    assert set(expected) == {"seen", "nearly", "unseen"}


@pytest.mark.timeout(300)
def test_answer_rows_say_what_was_seen(chain: Chain, tmp_path: Path) -> None:
    """Questions about seen entities were trained on; those about others have the same wording."""
    changes: dict[str, Any] = {"heldout_loss": {"kind": "heldout_loss"}, "overlap": {"kind": "overlap"}}
    sections = {"evaluations": evaluations(**changes)}
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), tmp_path, sections=sections)
    chain.run(job, config(job.name))
    rows = tables.read(job.outputs["answers"]).to_pylist()
    groups = {kind: {row["seen_text"] for row in rows if row["kind"] == kind} for kind in ("greedy", "reference")}
    assert {row["seen_text"] for row in rows if row["kind"] == "greedy" and row["split"] == "train"} == {"seen"}
    assert groups["reference"] <= {"nearly", "unseen"}
    assert None not in {row["seen_text"] for row in rows if row["kind"] == "overlap"}
    assert {row["seen_text"] for row in rows if row["kind"] == "sampled"} == {None}
