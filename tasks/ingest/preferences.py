"""Preference pairs (a chosen and a rejected reply) of Hugging Face data sets; each becomes a ranking of two.

The forms are those of TRL (https://huggingface.co/docs/trl/dataset_formats): `prompt`, `chosen` and `rejected` as texts
or lists of messages, or an implicit prompt, where chosen and rejected are whole conversations with the same beginning;
and transcripts with turns after "Human:" and "Assistant:", as in Anthropic's data
(https://github.com/anthropics/hh-rlhf). Both sides may repeat the prompt. Of the other columns only `system`, the text
of a system message, and `annotator` are read.
"""

import re
from typing import Any

from tasks.ingest.turns import Messages, Reasoning, Row, make_pair, make_turn, parse_message, require_messages

REQUIRED_COLUMNS = ("chosen", "rejected")
SPEAKER_ROLES = {"Human": "user", "Assistant": "assistant"}
SPEAKER_PATTERN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def convert(row: Row, reasoning: Reasoning = "reject") -> Row:
    """Return a pair as a ranking; raise ValueError with the reason if the row is not a pair."""
    missing = [name for name in REQUIRED_COLUMNS if row.get(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing; expected {', '.join(REQUIRED_COLUMNS)}, and prompt unless they contain it"
        )
    prompt = parse_prompt(row.get("prompt"), reasoning)
    chosen, rejected = (_strip_prompt(prompt, _parse_side(row[name], name, reasoning)) for name in REQUIRED_COLUMNS)
    for name, turns in zip(REQUIRED_COLUMNS, (chosen, rejected), strict=True):
        if turns[-1]["role"] != "assistant":
            raise ValueError(f"{name} ends with a turn of the {turns[-1]['role']}; expected the assistant's reply")
    shared = _count_shared_turns(chosen, rejected)
    prompt, chosen, rejected = prompt + chosen[:shared], chosen[shared:], rejected[shared:]
    if [message["role"] for message in (*chosen, *rejected)] != ["assistant", "assistant"]:
        raise ValueError(
            "chosen and rejected differ in more than one reply; expected conversations that differ in the assistant's "
            "last turn only"
        )
    if not prompt:
        raise ValueError(
            "no prompt: expected a column prompt (`columns: {prompt: ...}` names a field or a template for it), or in "
            "chosen and rejected whole conversations (messages with role and content, or a transcript that begins with "
            '"Human:")'
        )
    prompt = [turn for message in add_system(prompt, row.get("system")) for turn in make_turn(**message)]
    pair = make_pair(prompt, chosen[0]["content"], rejected[0]["content"])
    return {**pair, "annotator": row.get("annotator")}


def _parse_side(value: Any, name: str, reasoning: Reasoning) -> Messages:
    """Return the turns of chosen or rejected: a list of messages, a transcript, or a text that is one reply."""
    if isinstance(value, str):
        return _parse_transcript(value) or [{"role": "assistant", "content": value}]
    return [turn for message in require_messages(value, name) for turn in parse_message(message, reasoning, True)]


def add_system(prompt: Messages, system: Any) -> Messages:
    """Return the prompt after a system message, if `system` is a text and the prompt does not begin with one."""
    return prompt if not system or prompt[0]["role"] == "system" else make_turn("system", system) + prompt


def parse_prompt(value: Any, reasoning: Reasoning) -> Messages:
    """Return the turns of the prompt, without the empty assistant turn that ends a transcript."""
    if value is None:
        return []
    if not isinstance(value, str):
        return [turn for message in require_messages(value, "prompt") for turn in parse_message(message, reasoning)]
    turns = _parse_transcript(value) or [{"role": "user", "content": value}]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def _parse_transcript(value: str) -> Messages:
    """Return the turns of a text that begins with "Human:"; of any other text an empty list."""
    if not re.match(r"\s*Human:", value):
        return []
    _, *parts = SPEAKER_PATTERN.split(value)
    return [
        {"role": SPEAKER_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _strip_prompt(prompt: Messages, turns: Messages) -> Messages:
    """Return the turns without the prompt if they begin with it."""
    repeats = bool(prompt) and len(turns) > len(prompt) and turns[: len(prompt)] == prompt
    return turns[len(prompt) :] if repeats else turns


def _count_shared_turns(chosen: Messages, rejected: Messages) -> int:
    """Return the number of equal turns at the beginning of both sides, not counting the last turn of either."""
    most = min(len(chosen), len(rejected)) - 1
    return next((number for number in range(most) if chosen[number] != rejected[number]), most)
