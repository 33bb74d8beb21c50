"""Near-duplicate conversations: branches of one conversation are kept, copies of one are not."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from tasks.validate.branches import MessageSignatures
from tasks.validate.near_duplicates import DuplicateFinder, NearDuplicates
from tasks.validate.signatures import minhash_signatures

NEAR = NearDuplicates()
VOCABULARY = [f"word{number}" for number in range(500)]
GENERATOR = random.Random(7)


def message(length: int) -> list[str]:
    return GENERATOR.choices(VOCABULARY, k=length)


def edited(words: Sequence[str]) -> list[str]:
    """Return the words with one replaced."""
    return [*words[:10], "another", *words[11:]]


OPENING, QUESTION, REPLY = message(200), message(60), message(80)
FIRST = [OPENING, message(80), QUESTION, REPLY]


def redundant(*conversations: list[list[str]]) -> list[int]:
    """Return the numbers of the redundant conversations, added in two batches."""
    finder = DuplicateFinder(None, NEAR)
    finder.add_conversations([(messages, False) for messages in conversations[:1]])
    finder.add_conversations([(messages, False) for messages in conversations[1:]])
    return np.flatnonzero(finder.find_redundant()[1]).tolist()


@pytest.mark.parametrize(
    "branch",
    [
        [*FIRST[:3], message(80)],  # the same question with another answer
        [*FIRST[:2], message(10), message(10)],  # the same first turns, another continuation
        [*FIRST, message(10), message(10)],  # a longer conversation
        [OPENING, ["yes"]],
        [message(5), *FIRST[1:]],  # another first message
        [*FIRST[:2], message(5), REPLY],  # another question with the same answer
    ],
)
def test_branch_of_a_conversation_is_kept(branch: list[list[str]]) -> None:
    assert redundant(FIRST, branch) == []
    assert redundant(branch, FIRST) == []


def test_short_answers_to_the_same_question_are_branches() -> None:
    assert redundant([OPENING, ["yes"]], [OPENING, ["no"]], [OPENING, ["yes"]]) == [2]


@pytest.mark.parametrize(
    "copy", [FIRST, [edited(OPENING), *FIRST[1:]], [*FIRST[:3], edited(REPLY)], [edited(part) for part in FIRST]]
)
def test_copy_of_a_conversation_is_found(copy: list[list[str]]) -> None:
    assert redundant(FIRST, copy) == [1]


def test_copy_is_found_among_many_branches() -> None:
    branches = [[OPENING, message(60), QUESTION, message(60)] for _ in range(30)]
    copies = [[*branch[:3], edited(branch[3])] for branch in branches]
    assert redundant(*branches, *copies) == list(range(30, 60))


def test_signature_of_a_conversation_is_that_of_its_shingles() -> None:
    """The least of the messages' signatures is the signature of all their shingles together."""
    messages = MessageSignatures(3, 64)
    (whole,) = messages.append([[["a", "b", "c", "d"], ["yes"]]])
    parts = minhash_signatures([["a", "b", "c"], ["b", "c", "d"], ["yes"]], 3, 64)
    messages.close()
    assert np.array_equal(whole, parts.min(axis=0))
