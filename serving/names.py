"""Score whole names at a [MASK], with any masked language model.

A [MASK] stands for one whole name. A name of n tokens is scored at n mask tokens, by the sum of its tokens'
log-probabilities; candidates of all lengths compete. The model is a plain function from token ids and attention mask to
logits, so that the exported encoder and the torch model share this code.

Several masks of one text are filled independently; the others stay one mask token wide.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from serving.errors import InputError, PackageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MASK = "[MASK]"  # in texts, whatever the model's own mask token is

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Logits = Callable[[Ints, Ints], Floats]  # ids, attention mask: (rows, tokens) -> (rows, tokens, vocabulary)
Encode = Callable[[str], Sequence[int]]  # text -> token ids, no special tokens added


class NameScore(NamedTuple):
    """A candidate for a mask and its probability among all candidates."""

    name: str
    score: float


@dataclass(frozen=True)
class Codec:
    """The encoder's input format: the tokenizer and the ids of its special tokens."""

    encode: Encode
    bos: int
    eos: int
    mask: int


def make_codec(tokenizer: "Tokenizer", special: Mapping[str, Any]) -> Codec:
    """Return the codec of a tokenizer; `special` holds the ids `first`, `last` and `mask`.

    Raises PackageError if one is missing.
    """

    def encode_plain(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    # Some tokenizers (DeBERTa's, BERT's) treat the beginning of a text like a word after a space: another space would
    # be a token of its own.
    implies_space = encode_plain("a a") == encode_plain("a") * 2

    def encode(text: str) -> list[int]:
        return encode_plain(text.removeprefix(" ") if implies_space else text)

    if missing := [name for name in ("first", "last", "mask") if not isinstance(special.get(name), int)]:
        raise PackageError(f"The encoder's tokenizer lacks a token: {' and '.join(missing)}. Export the model again.")
    return Codec(encode, bos=special["first"], eos=special["last"], mask=special["mask"])


@dataclass(frozen=True)
class Slot:
    """One mask of a text: the token ids before and after it, and whether the name starts with a space."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    spaced: bool

    def row(self, codec: Codec, length: int) -> list[int]:
        """Return the model's input ids with `length` mask tokens at this slot."""
        return [codec.bos, *self.before, *[codec.mask] * length, *self.after, codec.eos]


class Candidates:
    """The candidate names, tokenized with and without a leading space. `groups`: spaced -> length -> (indices, ids)."""

    def __init__(self, names: Sequence[str], codec: Codec) -> None:
        if not names or len(set(names)) != len(names):
            found = f"{len(names)} names, {len(set(names))} of them different"
            raise ValueError(f"Candidates must be one or more different names; found {found}.")
        self.names = tuple(names)
        self.groups = {spaced: _group_by_length(names, codec, spaced) for spaced in (False, True)}

    def max_tokens(self, spaced: bool) -> int:
        """Return the token count of the longest name."""
        return max(self.groups[spaced])


def _group_by_length(names: Sequence[str], codec: Codec, spaced: bool) -> dict[int, tuple[Ints, Ints]]:
    """Group the names by token count: length -> (indices of the names, their token ids (names, length))."""
    groups: dict[int, list[tuple[int, Sequence[int]]]] = defaultdict(list)
    for index, name in enumerate(names):
        tokens = codec.encode(f" {name}" if spaced else name)
        groups[len(tokens)].append((index, tokens))
    return {
        length: (np.array([index for index, _ in group]), np.array([tokens for _, tokens in group], np.int64))
        for length, group in sorted(groups.items())
    }


def find_slots(text: str, codec: Codec) -> Iterator[Slot]:
    """Yield one slot per [MASK] of a text, in order. The first slot is enough to check the text's length."""
    pieces = text.split(MASK)
    if len(pieces) < 2:
        raise InputError(f"The input has no {MASK}: write one where the name belongs.")
    # The space before a mask belongs to the name's first token, as in running text.
    tokens = [codec.encode(piece.removesuffix(" ")) for piece in pieces[:-1]] + [codec.encode(pieces[-1])]
    for at in range(1, len(pieces)):
        yield Slot(_join(tokens[:at], codec), _join(tokens[at:], codec), pieces[at - 1].endswith(" "))


def single_slot(text: str, codec: Codec) -> Slot:
    """Return the slot of a text with exactly one [MASK]; raise InputError otherwise."""
    first, *others = find_slots(text, codec)
    if others:
        raise InputError(f"A text with one {MASK} was expected; {text!r} has {1 + len(others)}.")
    return first


def _join(pieces: Sequence[Sequence[int]], codec: Codec) -> tuple[int, ...]:
    """Return the tokens of all pieces, joined by mask tokens."""
    joined = [*pieces[0]]
    for piece in pieces[1:]:
        joined += [codec.mask, *piece]
    return tuple(joined)


def log_scores(logits: Logits, codec: Codec, candidates: Candidates, slots: Sequence[Slot], batch: int = 64) -> Floats:
    """Return the log-probability of every candidate at every slot: (slots, names), in nats.

    A batch contains rows of one length only: where activations are quantized per batch, padding would change the
    scores.
    """
    scores = np.zeros((len(slots), len(candidates.names)))
    for rows in _batches(codec, candidates, slots, batch):
        ids = np.array([slots[at].row(codec, length) for at, length in rows], np.int64)
        outputs = logits(ids, np.ones_like(ids))
        for (at, length), output in zip(rows, outputs, strict=True):
            start = 1 + len(slots[at].before)
            indices, tokens = candidates.groups[slots[at].spaced][length]
            chosen = log_softmax(output[start : start + length])  # (length, vocabulary)
            scores[at, indices] = chosen[np.arange(length), tokens].sum(-1)
    return scores


def _batches(
    codec: Codec, candidates: Candidates, slots: Sequence[Slot], batch: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (slot index, name length) whose rows have equal length."""
    by_width: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for at, slot in enumerate(slots):
        for length in candidates.groups[slot.spaced]:
            by_width[len(slot.row(codec, length))].append((at, length))
    for _, rows in sorted(by_width.items()):
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))


def log_softmax(values: Floats) -> Floats:
    """Return log-probabilities over the last axis, in float64."""
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    normalized: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def probabilities(scores: Floats) -> Floats:
    """Turn log-scores into probabilities over the candidates: they sum to 1 along the last axis."""
    return np.exp(log_softmax(scores))


def top_names(scores: Floats, candidates: Candidates, top: int) -> list[list[NameScore]]:
    """Return the `top` names of every slot, best first, from log-scores (slots, names)."""
    candidate_probabilities = probabilities(scores)
    orders = np.argsort(-scores, axis=-1, kind="stable")[:, :top]
    return [
        [NameScore(candidates.names[index], float(row[index])) for index in order]
        for row, order in zip(candidate_probabilities, orders, strict=True)
    ]
