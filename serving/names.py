"""Score whole names in the place of [MASK], with any masked language model.

A mask stands for one whole name. A name of n tokens takes the place of n mask tokens; its score is the sum of its
tokens' log-probabilities, and every candidate competes, long and short. The model is a plain function from token ids
and attention mask to logits, so that the service's ONNX encoder and the chain's torch encoder share this arithmetic.

Several masks in one text are filled each by itself: the others stay one mask token wide.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from serving.errors import InputError, PackageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEGIN, END, MASK = "<|bos|>", "<|end|>", "[MASK]"

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Logits = Callable[[Ints, Ints], Floats]  # ids, attention mask: (rows, tokens) -> (rows, tokens, vocabulary)
Encode = Callable[[str], Sequence[int]]  # text -> token ids, no special tokens added


class NameScore(NamedTuple):
    """One candidate for a mask, with its probability among all candidates."""

    name: str
    score: float


@dataclass(frozen=True)
class Codec:
    """How text becomes what the encoder reads: the tokenizer and the special tokens around and inside a text."""

    encode: Encode
    begin: int
    end: int
    mask: int


def codec_of(tokenizer: "Tokenizer") -> Codec:
    """Return how the encoder reads text, by the names of the chain's special tokens."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    ids = {token: tokenizer.token_to_id(token) for token in (BEGIN, END, MASK)}
    if missing := [token for token, found in ids.items() if found is None]:
        raise PackageError(f"The encoder's tokenizer lacks {' and '.join(missing)}.")
    return Codec(encode, begin=ids[BEGIN], end=ids[END], mask=ids[MASK])


@dataclass(frozen=True)
class Slot:
    """One mask of a text: the token ids before and after it, and whether the name brings the space before it."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    spaced: bool

    def row(self, codec: Codec, length: int) -> list[int]:
        """Return the model's input with this slot as wide as a name of `length` tokens."""
        return [codec.begin, *self.before, *[codec.mask] * length, *self.after, codec.end]


class Candidates:
    """The names that compete, tokenized once with and once without a space before them."""

    def __init__(self, names: Sequence[str], codec: Codec) -> None:
        if not names or len(set(names)) != len(names):
            found = f"{len(names)} names, {len(set(names))} of them different"
            raise ValueError(f"Candidates must be one or more different names; found {found}.")
        self.names = tuple(names)
        self.groups = {spaced: _by_length(names, codec, spaced) for spaced in (False, True)}

    def longest(self, spaced: bool) -> int:
        """Return the number of tokens of the longest name."""
        return max(self.groups[spaced])


def _by_length(names: Sequence[str], codec: Codec, spaced: bool) -> dict[int, tuple[Ints, Ints]]:
    """Group the names by token count: length -> (indices of the names, their token ids (names, length))."""
    groups: dict[int, list[tuple[int, Sequence[int]]]] = defaultdict(list)
    for index, name in enumerate(names):
        tokens = codec.encode(f" {name}" if spaced else name)
        groups[len(tokens)].append((index, tokens))
    return {
        length: (np.array([index for index, _ in group]), np.array([tokens for _, tokens in group], np.int64))
        for length, group in sorted(groups.items())
    }


def slots(text: str, codec: Codec) -> Iterator[Slot]:
    """Yield one slot for each [MASK] of a text, in order; the first tells already whether the text is too long."""
    pieces = text.split(MASK)
    if len(pieces) < 2:
        example = f"The capital of {MASK} is Paris."
        raise InputError(f'The input has no {MASK}: write one where the name belongs, as in "{example}"')
    # The space before a mask goes into the name's first token, as it would in running text.
    tokens = [codec.encode(piece.removesuffix(" ")) for piece in pieces[:-1]] + [codec.encode(pieces[-1])]
    for at in range(1, len(pieces)):
        yield Slot(_join(tokens[:at], codec), _join(tokens[at:], codec), pieces[at - 1].endswith(" "))


def only_slot(text: str, codec: Codec) -> Slot:
    """Return the slot of a text that must have one [MASK]."""
    first, *others = slots(text, codec)
    if others:
        raise InputError(f"A text with one {MASK} was expected; {text!r} has {1 + len(others)}.")
    return first


def _join(pieces: Sequence[Sequence[int]], codec: Codec) -> tuple[int, ...]:
    """Return the tokens of all pieces, with one mask token between each two."""
    joined = [*pieces[0]]
    for piece in pieces[1:]:
        joined += [codec.mask, *piece]
    return tuple(joined)


def log_scores(logits: Logits, codec: Codec, candidates: Candidates, places: Sequence[Slot], batch: int = 64) -> Floats:
    """Return the log-probability of every candidate at every slot: (slots, names), in nats.

    Rows of one length run together, so nothing is ever padded: where activations are quantized for a whole batch at a
    time, padding would change the scores.
    """
    scores = np.zeros((len(places), len(candidates.names)))
    for rows in _batches(codec, candidates, places, batch):
        ids = np.array([places[at].row(codec, length) for at, length in rows], np.int64)
        outputs = logits(ids, np.ones_like(ids))
        for (at, length), output in zip(rows, outputs, strict=True):
            start = 1 + len(places[at].before)
            indices, tokens = candidates.groups[places[at].spaced][length]
            chosen = log_softmax(output[start : start + length])  # (length, vocabulary)
            scores[at, indices] = chosen[np.arange(length), tokens].sum(-1)
    return scores


def _batches(
    codec: Codec, candidates: Candidates, places: Sequence[Slot], batch: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (slot, name length) whose rows are equally long."""
    by_width: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for at, place in enumerate(places):
        for length in candidates.groups[place.spaced]:
            by_width[len(place.row(codec, length))].append((at, length))
    for _, rows in sorted(by_width.items()):
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))


def log_softmax(values: Floats) -> Floats:
    """Return log-probabilities over the last axis, in double precision."""
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    normalized: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def probabilities(scores: Floats) -> Floats:
    """Turn log-scores into probabilities over the candidates: they sum to 1 along the last axis."""
    return np.exp(log_softmax(scores))


def best(scores: Floats, candidates: Candidates, top: int) -> list[list[NameScore]]:
    """Return the `top` names of every slot, best first, from log-scores (slots, names)."""
    shares = probabilities(scores)
    orders = np.argsort(-scores, axis=-1, kind="stable")[:, :top]
    return [
        [NameScore(candidates.names[index], float(row[index])) for index in order]
        for row, order in zip(shares, orders, strict=True)
    ]
