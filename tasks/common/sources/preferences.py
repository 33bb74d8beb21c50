"""Pairs of a chosen and a rejected reply, as Hugging Face data sets hold them; each becomes a ranking of two.

The forms are those of TRL's guide (https://huggingface.co/docs/trl/dataset_formats): `prompt`, `chosen` and `rejected`
as texts or lists of messages, or without `prompt` (implicit), where both sides are whole conversations that share their
beginning; and transcripts with a turn after each "Human:" and "Assistant:", as in Anthropic's data
(https://github.com/anthropics/hh-rlhf). Both sides may repeat the prompt. Other columns are not read, but for
`annotator`.
"""

import re
from typing import Any

from tasks.common.sources.turns import Messages, Row, messages, preference, said, turn

NEEDED = ("chosen", "rejected")
READ = {*NEEDED, "prompt", "annotator"}
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def convert(row: Row) -> Row:
    """Return a pair as a ranking; raise ValueError with the reason where it is none."""
    missing = [name for name in NEEDED if row.get(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; expected {', '.join(NEEDED)}, and prompt unless they hold it")
    prompt = _asked(row.get("prompt"))
    chosen, rejected = (_without(prompt, _told(row[name], name)) for name in NEEDED)
    for name, turns in zip(NEEDED, (chosen, rejected), strict=True):
        if turns[-1]["role"] != "assistant":
            raise ValueError(f"{name} ends with a turn of the {turns[-1]['role']}; expected the assistant's reply")
    shared = _shared(chosen, rejected)
    prompt, chosen, rejected = prompt + chosen[:shared], chosen[shared:], rejected[shared:]
    if [message["role"] for message in (*chosen, *rejected)] != ["assistant", "assistant"]:
        raise ValueError(
            "chosen and rejected differ in more than one reply; expected conversations that are the same but for the "
            "assistant's last turn"
        )
    if not prompt:
        raise ValueError(
            "no prompt: expected a column prompt, or in chosen and rejected whole conversations (messages with role "
            'and content, or a transcript that begins with "Human:")'
        )
    pair = preference([told for one in prompt for told in turn(**one)], chosen[0]["content"], rejected[0]["content"])
    return {**pair, "annotator": row.get("annotator")}


def _told(value: Any, name: str) -> Messages:
    """Return a side's turns: a list of messages, a transcript, or a text that is one reply."""
    if isinstance(value, str):
        return _transcript(value) or [{"role": "assistant", "content": value}]
    return [told for message in messages(value, name) for told in said(message)]


def _asked(value: Any) -> Messages:
    """Return the prompt's turns; the empty turn with which a transcript asks for a reply is none."""
    if value is None:
        return []
    if not isinstance(value, str):
        return [told for message in messages(value, "prompt") for told in said(message)]
    turns = _transcript(value) or [{"role": "user", "content": value}]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def _transcript(value: str) -> Messages:
    """Return the turns of a text that begins with a speaker; of any other text none."""
    if not re.match(r"\s*Human:", value):
        return []
    _, *parts = SPEAKER.split(value)
    return [
        {"role": SPEAKERS[speaker], "content": told.strip()}
        for speaker, told in zip(parts[::2], parts[1::2], strict=True)
    ]


def _without(prompt: Messages, turns: Messages) -> Messages:
    """Return what follows the prompt where the turns repeat it."""
    repeats = bool(prompt) and len(turns) > len(prompt) and turns[: len(prompt)] == prompt
    return turns[len(prompt) :] if repeats else turns


def _shared(chosen: Messages, rejected: Messages) -> int:
    """Return how many turns both sides begin with; the last of each is never among them."""
    most = min(len(chosen), len(rejected)) - 1
    return next((number for number in range(most) if chosen[number] != rejected[number]), most)
